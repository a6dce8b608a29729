"""RMS norms against plain Python, the rounding of the residual, shapes, aliasing and hostile arguments."""

import bisect
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


def _fp8_values(dtype: torch.dtype) -> list[float]:
    """The finite values of an FP8 format, negative ones too, ascending, from their bits."""
    exponent_bits, mantissa_bits = (4, 3) if dtype == torch.float8_e4m3fn else (5, 2)
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            last = exponent == 2**exponent_bits - 1
            if last and (exponent_bits == 5 or mantissa == 2**mantissa_bits - 1):
                continue  # infinities and NaN
            significand = mantissa / 2**mantissa_bits + (exponent > 0)
            values.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return sorted({sign * value for value in values for sign in (1.0, -1.0)})


def _nearest(value: float, values: list[float]) -> float:
    """Saturated and rounded to nearest, ties to an even last bit, in plain Python."""
    value = min(max(value, values[0]), values[-1])
    after = min(bisect.bisect_left(values, value), len(values) - 1)
    before = max(after - 1, 0)
    if values[after] == value:
        return value
    below, above = value - values[before], values[after] - value
    if below != above:
        return values[before] if below < above else values[after]
    # Values alternate between even and odd last bits, and zero, in the middle, is even.
    return values[before] if (before - len(values) // 2) % 2 == 0 else values[after]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 0.02, torch.tensor([0.3]), torch.tensor(7.0)])
def test_fp8_output_against_plain_python(dtype: torch.dtype, scale: float | torch.Tensor) -> None:
    x, weight = _x(3, D, dtype=torch.float64), _x(D, dtype=torch.float64, seed=1)
    weight[0] = 1e9  # saturates
    out = torch.empty(3, D, dtype=dtype)
    assert fi.rmsnorm(x, weight, 1e-6, scale=scale, out=out) is out
    residual = x.clone()
    added = fi.add_rmsnorm(x, residual, weight, 1e-6, scale=scale, out=torch.empty_like(out))
    assert torch.equal(residual, 2 * x)
    divisor, values = torch.as_tensor(scale, dtype=torch.float32).item(), _fp8_values(dtype)
    for found, factor in ((out, 1.0), (added, 2.0)):
        for row in range(3):
            norm = _by_hand([factor * value for value in x[row].tolist()], weight.tolist(), 1e-6, 0.0)
            assert found[row].double().tolist() == [_nearest(value / divisor, values) for value in norm]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_output_of_values_at_the_ends(dtype: torch.dtype) -> None:
    # Rows of ones: the norm is the weight. Ties go to even, infinities saturate, NaN stays.
    largest, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    weight = torch.tensor([1 + step / 2, 1 + 1.5 * step, largest * 1.01, -1e30, math.inf, -math.inf, math.nan, -1e-30])
    out = torch.zeros(2, 8, dtype=dtype)
    found = fi.rmsnorm(torch.ones(2, 8), weight, 0.0, scale=1.0, out=out)[1].float()
    assert found[:6].tolist() == [1.0, 1 + 2 * step, largest, -largest, largest, -largest]
    assert found[6].isnan()
    assert found[7] == 0 and found[7].signbit()


def test_fp8_output_is_not_rounded_to_the_dtype_of_x_before() -> None:
    # In bfloat16 the norm 1 + 2^-4 + 2^-9 would be 1 + 2^-4, a tie that goes to 1 in e4m3.
    weight = torch.full((8,), 2.0**-4 + 2.0**-9, dtype=torch.bfloat16)
    out = torch.empty(1, 8, dtype=torch.float8_e4m3fn)
    fi.rmsnorm(torch.ones(1, 8, dtype=torch.bfloat16), weight, 0.0, weight_bias=1.0, scale=1.0, out=out)
    assert out.float().tolist() == [[1.125] * 8]


def test_per_head_fp8_norm_of_a_slice() -> None:
    qkv, weight = _x(5, 6, D, dtype=torch.bfloat16), _x(D, dtype=torch.bfloat16, seed=1)
    wide = torch.full((5, 6, D), math.nan).to(torch.float8_e4m3fn)
    fi.rmsnorm(qkv[:, 1:3], weight, scale=0.02, out=wide[:, 1:3])
    expected = fi.rmsnorm(
        qkv[:, 1:3].contiguous(), weight, scale=0.02, out=torch.empty(5, 2, D, dtype=torch.float8_e4m3fn)
    )
    assert torch.equal(wide[:, 1:3].float(), expected.float())
    assert wide[:, :1].float().isnan().all() and wide[:, 3:].float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bad_scales_are_named(dtype: torch.dtype) -> None:
    x, weight, out = _x(4, D), _x(D), torch.empty(4, D, dtype=dtype)
    for argument, scale in {
        "scale": None,
        "scale ": 0.0,
        "scale  ": -1.0,
        "scale   ": math.nan,
        "scale    ": math.inf,
        "scale     ": 1e-50,
        "scale      ": True,
        "scale       ": "1",
        "scale.dtype": torch.ones(1, dtype=torch.float64),
        "scale.device": torch.ones(1, device="meta"),
        "scale        ": torch.ones(2),
    }.items():
        for call in (fi.rmsnorm, lambda x, weight, **more: fi.add_rmsnorm(x, x.clone(), weight, **more)):
            with pytest.raises(fi.ArgumentError) as caught:
                call(x, weight, scale=scale, out=out)
            assert caught.value.argument == argument.strip()
    for other in (None, torch.empty_like(x)):
        with pytest.raises(fi.ArgumentError, match="FP8|float8_e4m3fn") as caught:
            fi.rmsnorm(x, weight, scale=1.0, out=other)
        assert caught.value.argument == "scale"
    with pytest.raises(fi.ArgumentError) as caught:
        fi.rmsnorm(x, weight, scale=1.0, out=out[:2])
    assert caught.value.argument == "out"


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
    fp8 = torch.float8_e4m3fn
    assert rmsnorm_module.cost(4, D, torch.bfloat16, fp8).num_bytes == 2 * (4 * D + D) + 4 * D
    assert add_rmsnorm_module.cost(4, D, torch.bfloat16, fp8).num_bytes == 2 * (3 * 4 * D + D) + 4 * D


def test_compiled_calls_see_one_operator() -> None:
    x, residual, weight = _x(4, D), _x(4, D, seed=3), _x(D, seed=1)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return fi.rmsnorm(fi.add_rmsnorm(x, residual, weight), weight, weight_bias=1.0)

    first, second = residual.clone(), residual.clone()
    expected = layer(x, first)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, second)
    assert torch.equal(actual, expected)
    assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [0.02, torch.tensor([0.02])])
def test_compiled_calls_with_fp8_output(scale: float | torch.Tensor) -> None:
    x, weight = _x(4, D), _x(D, seed=1)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
        return fi.add_rmsnorm(x, residual, weight, scale=scale, out=out)

    expected = layer(x, x.clone())
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, x.clone())
    assert torch.equal(actual.float(), expected.float())
