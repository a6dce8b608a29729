"""The sampler and the layers that replace vLLM's, against vLLM's own forms in torch."""

import fi_vllm
import pytest
import torch
import vllm.v1.sample.ops.penalties as engine_penalties
import vllm.v1.sample.sampler as engine_sampler
from fi_vllm.layers import REPLACED
from fi_vllm.sampler import FiTopKTopPSampler
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.utils import apply_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch


@pytest.fixture(autouse=True)
def _registered():
    fi_vllm.register_sampler()
    fi_vllm.register_layers()


def filtered(logits, k, p):
    return apply_top_k_top_p_pytorch(logits.clone(), k, p)


def test_vllms_sampler_makes_ours():
    assert isinstance(engine_sampler.Sampler().topk_topp_sampler, FiTopKTopPSampler)


@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("with_p", [True, False])
def test_what_is_kept_is_what_vllm_keeps(with_k, with_p):
    torch.manual_seed(0)
    logits = torch.randn(6, 200) * 3
    k = torch.tensor([1, 5, 200, 20, 200, 3]) if with_k else None
    p = torch.tensor([1.0, 0.5, 0.9, 0.7, 1.0, 0.01]) if with_p else None
    tokens, kept = FiTopKTopPSampler("processed_logits")(logits.clone(), {}, k, p)
    expected = filtered(logits, k, p)
    torch.testing.assert_close(kept, expected)
    assert expected.gather(1, tokens[:, None]).isfinite().all()
    _, logprobs = FiTopKTopPSampler("processed_logprobs")(logits.clone(), {}, k, p)
    torch.testing.assert_close(logprobs, expected.log_softmax(dim=-1))


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    num, logits = 4000, torch.randn(1, 40) * 2
    k, p = torch.full((num,), 9), torch.full((num,), 0.8)
    tokens, nothing = FiTopKTopPSampler()(logits.expand(num, 40).clone(), {}, k, p)
    expected = filtered(logits, k[:1], p[:1]).softmax(-1)[0]
    found = torch.bincount(tokens, minlength=40) / num
    assert nothing is None and (found - expected).abs().max() < 5 * (0.25 / num) ** 0.5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_request_with_a_seed_draws_alike_in_any_batch(dtype):
    logits, sampler = torch.zeros(4, 500), FiTopKTopPSampler()

    def tokens(row, num_rows):
        generators, k = {row: torch.Generator().manual_seed(5)}, torch.full((num_rows,), 300, dtype=dtype)
        return [int(sampler(logits[:num_rows].clone(), generators, k, None)[0][row]) for _ in range(3)]

    assert tokens(0, 1) == tokens(2, 4)


@pytest.mark.parametrize("vocab_size", [64, 1001])
def test_penalties_are_vllms(vocab_size):
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size) * 4
    prompts = torch.randint(0, vocab_size, (3, 20))
    prompts[1, 5:] = vocab_size  # vLLM's padding
    outputs = [[1, 2, 2, 7], [], [9, 9, 9, -1]]  # -1: a token that is not known yet
    presence, frequency = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([0.1, 0.7, 0.0])
    repetition = torch.tensor([1.3, 1.0, 0.8])
    asked = (prompts, presence, frequency, repetition, outputs)
    found = engine_sampler.apply_all_penalties(logits.clone(), *asked)
    assert engine_penalties.apply_penalties.__module__ == "fi_vllm.sampler"
    engine_penalties.apply_penalties = apply_penalties  # vLLM's own
    expected = engine_sampler.apply_all_penalties(logits.clone(), *asked)
    torch.testing.assert_close(found, expected)


def test_every_class_is_replaced_and_keeps_its_settings_name():
    for engine_class, ours in REPLACED.items():
        assert op_registry_oot[engine_class.__name__] is ours and issubclass(ours, engine_class)
        assert ours.name == engine_class.name
    assert type(RMSNorm(8)).__module__ == "fi_vllm.layers"


def with_residual(layer, method, x, residual):
    return getattr(layer, method)(x.clone(), None if residual is None else residual.clone())


@pytest.mark.parametrize("engine_class", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms(engine_class, residual, dtype):
    torch.manual_seed(0)
    layer = engine_class(64).to(dtype)
    layer.weight.data = torch.randn(64, dtype=dtype) * 0.3
    x, other = torch.randn(5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype) if residual else None
    found = with_residual(layer, "forward_cuda", x, other)
    expected = with_residual(layer, "forward_native", x, other)
    pairs = zip(found, expected, strict=True) if residual else [(found, expected)]
    limits = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, two in pairs:
        torch.testing.assert_close(one, two, **limits)


@pytest.mark.parametrize("layer", [lambda: SiluAndMul(compile_native=False), lambda: GeluAndMul("tanh"), GeluAndMul])
def test_activations(layer):
    layer, x = layer(), torch.randn(7, 96)
    torch.testing.assert_close(layer.forward_cuda(x), layer.forward_native(x))
    assert isinstance(layer, CustomOp) and type(layer) in REPLACED.values()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.parametrize("keys", [True, False])
def test_rotary_embedding(is_neox, rotary_dim, keys):
    torch.manual_seed(0)
    layer = RotaryEmbedding(32, rotary_dim, 64, 10000.0, is_neox, torch.float32)
    positions, fused = torch.randint(0, 64, (9,)), torch.randn(9, 6 * 32)
    q, k = fused[:, :128], fused[:, 128:] if keys else None  # parts of one row, as models slice them
    expected = layer.forward_native(positions, q.clone(), None if k is None else k.clone())
    found = layer.forward_cuda(positions, q, k)
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


def test_a_scaled_rotary_embedding():
    layer = Llama3RotaryEmbedding(32, 32, 64, 10000.0, True, torch.float32, 8.0, 1.0, 4.0, 32)
    positions, q = torch.arange(50), torch.randn(50, 64)
    expected, _ = layer.forward_native(positions, q.clone())
    torch.testing.assert_close(layer.forward_cuda(positions, q)[0], expected)
    assert type(layer).__module__ == "fi_vllm.layers"


@pytest.mark.parametrize("residual", [True, False])
def test_norms_and_activations_are_compiled_as_one_graph(residual):
    """Inductor's graphs of a model must not break where ``custom_ops`` enables an op."""
    torch.manual_seed(0)
    norm, gate = RMSNorm(64), SiluAndMul(compile_native=False)
    norm.weight.data = torch.randn(64)
    x, other = torch.randn(5, 64), torch.randn(5, 64) if residual else None

    def through(x, other):
        found = norm.forward_cuda(x, other)
        return gate.forward_cuda(found[0] if residual else found)

    arguments = (x.clone(), None if other is None else other.clone())
    found = torch.compile(through, backend="eager", fullgraph=True)(*arguments)
    expected = norm.forward_native(x, other)
    torch.testing.assert_close(found, gate.forward_native(expected[0] if residual else expected))


def test_a_rotary_embedding_is_compiled_as_one_graph():
    layer = RotaryEmbedding(32, 32, 64, 10000.0, True, torch.float32)
    positions, q, k = torch.arange(9), torch.randn(9, 128), torch.randn(9, 64)
    expected = layer.forward_native(positions, q.clone(), k.clone())
    found = torch.compile(layer.forward_cuda, backend="eager", fullgraph=True)(positions, q, k)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
