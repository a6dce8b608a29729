"""RMS norms against plain Python, the rounding of the residual, shapes, aliasing and hostile arguments."""

import math

import fi_core as fi
import pytest
import torch
from fi_core import conformance
from fi_core.ops import add_rmsnorm as add_rmsnorm_module
from fi_core.ops import rmsnorm as rmsnorm_module

D = 24


def _x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _by_hand(row: list[float], weight: list[float], eps: float, bias: float) -> list[float]:
    """One row in plain Python, exactly rounded sums."""
    scale = 1.0 / math.sqrt(math.fsum(value * value for value in row) / len(row) + eps)
    return [value * scale * (factor + bias) for value, factor in zip(row, weight, strict=True)]


@pytest.mark.parametrize(("eps", "bias"), [(1e-6, 0.0), (0.25, 1.0), (0.0, -0.5)])
def test_rmsnorm_against_plain_python(eps: float, bias: float) -> None:
    x, weight = _x(3, D, dtype=torch.float64), _x(D, dtype=torch.float64, seed=1)
    out = fi.rmsnorm(x, weight, eps, weight_bias=bias)
    for row in range(3):
        assert out[row].tolist() == pytest.approx(_by_hand(x[row].tolist(), weight.tolist(), eps, bias), rel=1e-13)


@conformance.parametrize("reference", ["rmsnorm", "add_rmsnorm"])
def test_reference_conforms(case: conformance.BoundCase) -> None:
    case()


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, D), (2, 3, 4, D), (2, 0, 4, D)])
def test_any_leading_dims(shape: tuple[int, ...]) -> None:
    x, weight = _x(*shape), _x(D, seed=1)
    out = fi.rmsnorm(x, weight)
    assert out.shape == x.shape
    assert torch.equal(out.view(-1, D), fi.rmsnorm(x.view(-1, D), weight))
    residual = x.clone()
    assert torch.equal(fi.add_rmsnorm(x, residual, weight), fi.rmsnorm(2 * x, weight))
    assert torch.equal(residual, 2 * x)


def test_more_than_three_dims_must_collapse() -> None:
    strided = _x(2, 3, 4, 2 * D)[:, ::2, :, :D].transpose(0, 1)
    with pytest.raises(fi.ArgumentError, match="collapse"):
        fi.rmsnorm(strided, _x(D))


def test_per_head_norm_of_a_slice_of_qkv_in_place() -> None:
    qkv = _x(5, 6, D, dtype=torch.bfloat16)
    before, q = qkv.clone(), qkv[:, 1:3]
    expected = fi.rmsnorm(before[:, 1:3].contiguous(), _x(D, dtype=torch.bfloat16, seed=1))
    assert fi.rmsnorm(q, _x(D, dtype=torch.bfloat16, seed=1), out=q) is q
    assert torch.equal(qkv[:, 1:3], expected)
    assert torch.equal(qkv[:, :1], before[:, :1])
    assert torch.equal(qkv[:, 3:], before[:, 3:])


def test_residual_is_rounded_before_the_norm_reads_it() -> None:
    # In bfloat16 256 + 1 rounds to 256, so the norm must see 256 exactly.
    x, residual = torch.ones(1, 8, dtype=torch.bfloat16), torch.full((1, 8), 256.0, dtype=torch.bfloat16)
    weight = torch.full((8,), 1.0, dtype=torch.bfloat16)
    residual[0, 0] = -8.0
    out = fi.add_rmsnorm(x, residual, weight, eps=0.0)
    assert residual[0].tolist() == [-7.0] + [256.0] * 7
    expected = torch.tensor(_by_hand(residual[0].tolist(), [1.0] * 8, 0.0, 0.0), dtype=torch.float64)
    assert torch.equal(out[0], expected.to(torch.bfloat16))
    assert torch.equal(out, fi.rmsnorm(residual, weight, eps=0.0))


def test_weight_bias_costs_no_precision() -> None:
    # RMS 10: the first value becomes 1.9 * (1 + w) = 1.9056, in bfloat16 244 / 128. A sum 1 + w in bfloat16 would be 1
    # and the result 243 / 128.
    x = torch.tensor([[19.0, 19.0, 8.0, 3.0, 2.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.full((8,), 3 * 2.0**-10, dtype=torch.bfloat16)
    assert fi.rmsnorm(x, weight, 0.0, weight_bias=1.0)[0, 0].item() == 244 / 128


def test_outputs_may_alias_x() -> None:
    x, residual, weight = _x(4, D), _x(4, D, seed=3), _x(D, seed=1)
    expected = fi.add_rmsnorm(x, residual.clone(), weight)
    assert fi.add_rmsnorm(x, residual, weight, out=x) is x
    assert torch.equal(x, expected)


def test_bad_arguments_are_named() -> None:
    x, weight = _x(4, D), _x(D)
    for argument, call in {
        "x.dtype": lambda: fi.rmsnorm(x.int(), weight),
        "x": lambda: fi.rmsnorm(x.t(), weight[:4]),
        "weight": lambda: fi.rmsnorm(x, weight[:-1]),
        "weight.dtype": lambda: fi.rmsnorm(x.half(), weight),
        "weight.device": lambda: fi.rmsnorm(x, weight.to("meta")),
        "eps": lambda: fi.rmsnorm(x, weight, -1.0),
        "out": lambda: fi.rmsnorm(x, weight, out=x[:2]),
        "out.dtype": lambda: fi.rmsnorm(x, weight, out=x.double()),
        "residual": lambda: fi.add_rmsnorm(x, x[:2], weight),
        "residual.dtype": lambda: fi.add_rmsnorm(x, x.double(), weight),
    }.items():
        with pytest.raises(fi.ArgumentError) as caught:
            call()
        assert caught.value.argument == argument
    with pytest.raises(fi.ArgumentError, match="eps"):
        fi.rmsnorm(x, weight, float("nan"))
    with pytest.raises(fi.ArgumentError, match="at least one dim"):
        fi.rmsnorm(torch.tensor(1.0), weight)
    with pytest.raises(fi.ArgumentError, match="at least 1"):
        fi.rmsnorm(x[:, :0], weight[:0])


def test_costs_count_every_byte_once() -> None:
    assert rmsnorm_module.cost(4, D, torch.bfloat16).num_bytes == 2 * (4 * D + D + 4 * D)
    assert add_rmsnorm_module.cost(4, D, torch.float32).num_bytes == 4 * (4 * 4 * D + D)


def test_compiled_calls_see_one_operator() -> None:
    x, residual, weight = _x(4, D), _x(4, D, seed=3), _x(D, seed=1)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return fi.rmsnorm(fi.add_rmsnorm(x, residual, weight), weight, weight_bias=1.0)

    first, second = residual.clone(), residual.clone()
    expected = layer(x, first)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, second)
    assert torch.equal(actual, expected)
    assert torch.equal(first, second)
