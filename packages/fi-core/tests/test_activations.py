"""Gated activations against plain Python, shapes and hostile arguments."""

import math

import fi_core as fi
import pytest
import torch
from fi_core import conformance
from fi_core.ops import gelu_mul as gelu_module
from fi_core.ops import silu_mul as silu_module


def _silu(value: float) -> float:
    return value / (1.0 + math.exp(-value)) if value > -700 else 0.0


def _gelu(value: float) -> float:
    return value * 0.5 * math.erfc(-value / math.sqrt(2.0))


def _gelu_tanh(value: float) -> float:
    return 0.5 * value * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))


CALLS = {
    "silu": (fi.silu_mul, _silu),
    "gelu": (lambda x: fi.gelu_mul(x, "none"), _gelu),
    "gelu_tanh": (fi.gelu_mul, _gelu_tanh),
}
EDGES = [0.0, -0.0, 1.0, -1.0, 0.3, -3.7, 6.0, -6.0, 40.0, -40.0, 1e-30, -1e-30, 1e4, -1e4]


@pytest.mark.parametrize("name", CALLS)
def test_against_plain_python(name: str) -> None:
    call, by_hand = CALLS[name]
    gate = torch.tensor(EDGES, dtype=torch.float64)
    up = torch.linspace(-2.0, 3.0, len(EDGES), dtype=torch.float64)
    out = call(torch.cat([gate, up]))
    expected = [by_hand(g) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert out.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@conformance.parametrize("reference", ["silu_mul", "gelu_mul"])
def test_reference_conforms(case: conformance.BoundCase) -> None:
    case()


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 3, 8), (2, 2, 3, 8), (2, 3, 0, 8), (0, 2, 3, 8)])
@pytest.mark.parametrize("call", [fi.silu_mul, fi.gelu_mul])
def test_any_leading_dims(shape: tuple[int, ...], call: object) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = torch.full((*shape[:-1], 4), float("nan"))
    assert call(x, out=out) is out
    assert torch.equal(out, call(x))
    assert torch.equal(out.view(-1, 4), call(x.view(-1, 8)))


def test_nan_and_infinity_are_not_hidden() -> None:
    x = torch.tensor([float("nan"), float("inf"), 1.0, 1.0, 1.0, float("nan")])
    out = fi.silu_mul(x)
    assert out[0].isnan()
    assert out[1] == float("inf")
    assert out[2].isnan()


def test_bad_arguments_are_named() -> None:
    x = torch.randn(4, 8)
    for argument, call in {
        "x": lambda: fi.silu_mul(x[:, :7].contiguous()),
        "x that is a list": lambda: fi.silu_mul([1.0, 2.0]),
        "out that is a list": lambda: fi.silu_mul(x, out=[0.0] * 4),
        "x.dtype": lambda: fi.silu_mul(x.to(torch.float8_e4m3fn)),
        "out": lambda: fi.silu_mul(x, out=x),
        "out of rows that share memory": lambda: fi.silu_mul(x, out=torch.zeros(1, 4).expand(4, 4)),
        "out.dtype": lambda: fi.gelu_mul(x, out=torch.empty(4, 4, dtype=torch.half)),
        "approximate": lambda: fi.gelu_mul(x, "sigmoid"),
    }.items():
        with pytest.raises(fi.ArgumentError) as caught:
            call()
        assert caught.value.argument == argument.split(" ")[0]


def test_costs_count_every_byte_once() -> None:
    assert silu_module.cost(4, 16, torch.bfloat16).num_bytes == 2 * 4 * (32 + 16)
    assert gelu_module.cost(4, 16, torch.float32).num_bytes == 4 * 4 * (32 + 16)


def test_compiled_calls_see_one_operator() -> None:
    x = torch.randn(4, 8)
    compiled = torch.compile(lambda x: fi.silu_mul(x) + fi.gelu_mul(x, "none"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fi.silu_mul(x) + fi.gelu_mul(x, "none"))
