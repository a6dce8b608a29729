"""Dims, targets and formats beyond a backend's declaration end in an error that names each of them, on no GPU."""

import fi_core as fi
import pytest
import torch

CAPACITY = {"max_batch": 1, "max_q_tokens": 1, "max_q_len": 1, "max_kv_len": 9}


def test_attention_names_the_dims_that_triton_does_not_serve():
    spec = fi.AttentionSpec(2, 2, 4097, 513, dtype=torch.bfloat16)
    with pytest.raises(fi.UnsupportedError) as caught:
        fi.plan(spec, **CAPACITY, device="cpu", backend="triton")
    (reasons,) = [reasons for kernel, reasons in caught.value.rejections if kernel.startswith("triton.")]
    assert any(reason.startswith(("head_dim: 4097", "device: cpu")) for reason in reasons)
    with pytest.raises(fi.UnsupportedError, match=r"triton\.\S+: .*head_dim: 4097 is not .*head_dim_vo: 513 is not "):
        with fi.use(backend="triton"):
            fi.explain(spec, device="cuda:sm_90")


def test_a_refused_call_names_the_size():
    values = {"dtype": torch.bfloat16, "hidden_size": 2**24, "out_format": "same"}
    request = fi.Request.of("rmsnorm", fi.Target("cuda", (9, 0)), **values)
    with pytest.raises(fi.UnsupportedError, match=r"hidden_size: 16777216 is not "):
        with fi.use(backend="triton"):
            fi.explain(request)
