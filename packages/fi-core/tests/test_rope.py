"""RoPE: frequencies against recorded values, rotation against complex numbers, layouts, aliasing and hostile arguments."""

import cmath
import math
from collections.abc import Callable
from dataclasses import replace

import fi_core as fi
import pytest
import torch
from fi_core import checks, conformance
from fi_core.reference.rope import apply_rope
from fi_core.rope import LinearScaling, Llama3Scaling, RopeConfig, RopeTable, YarnScaling
from fi_core.settings import settings

# Recorded from the float32 initialisation functions of a widely used model library, pair index -> radians a position.
RECORDED = {
    "llama3": (
        RopeConfig(128, 500000.0, scaling=Llama3Scaling()),
        1.0,
        {
            0: 1.0,
            10: 0.12868738174438477,
            28: 0.0032114461064338684,
            29: 0.0021665706299245358,
            31: 0.0008567514596506953,
            33: 0.0003126936499029398,
            35: 9.556212171446532e-05,
            63: 3.068925877869333e-07,
        },
    ),
    "llama3_factor_32": (
        RopeConfig(64, 500000.0, scaling=Llama3Scaling(32.0)),
        1.0,
        {1: 0.663601279258728, 10: 0.016560440883040428, 20: 8.570255886297673e-06, 31: 9.418306490260875e-08},
    ),
    "linear": (
        RopeConfig(128, 10000.0, scaling=LinearScaling(4.0)),
        1.0,
        {0: 0.25, 1: 0.21649108827114105, 31: 0.002886954927816987, 63: 2.8869548259535804e-05},
    ),
    "yarn": (
        RopeConfig(128, 1000000.0, scaling=YarnScaling(4.0, 32768)),
        1.138629436111989,
        {
            0: 1.0,
            20: 0.01333521492779255,
            25: 0.004131738096475601,
            30: 0.0010643609566614032,
            35: 0.0002462583943270147,
            40: 4.4456985051510856e-05,
            63: 3.102344408034696e-07,
        },
    ),
    "yarn_factor_40": (
        RopeConfig(64, 10000.0, scaling=YarnScaling(40.0, 4096, attention_factor=1.5)),
        1.5,
        {1: 0.7498942017555237, 10: 0.05623412877321243, 20: 0.0007905694073997438, 31: 3.3338035336782923e-06},
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_frequencies_match_recorded_values(name: str) -> None:
    config, factor, expected = RECORDED[name]
    frequencies = config.inv_freq()
    assert frequencies.dtype == torch.float64
    assert config.attention_factor == pytest.approx(factor, rel=1e-12)
    for pair, value in expected.items():
        assert frequencies[pair].item() == pytest.approx(value, rel=5e-7), pair


def test_plain_frequencies_follow_the_formula() -> None:
    expected = [10000.0 ** (-2 * pair / 96) for pair in range(48)]
    assert RopeConfig(96).inv_freq().tolist() == pytest.approx(expected, rel=1e-14)


def _by_complex_numbers(x: torch.Tensor, positions: list[int], config: RopeConfig) -> torch.Tensor:
    """x rotated in plain Python: one complex multiplication a pair."""
    out = x.double().clone()
    half = config.rotary_dim // 2
    frequencies = config.inv_freq().float().tolist()
    for token, position in enumerate(positions):
        for head in range(x.shape[1]):
            for pair in range(half):
                i, j = (pair, pair + half) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
                value = complex(x[token, head, i].item(), x[token, head, j].item())
                value *= cmath.exp(1j * position * frequencies[pair]) * config.attention_factor
                out[token, head, i], out[token, head, j] = value.real, value.imag
    return out


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("scaling", [None, YarnScaling(4.0, 64)])
def test_oracle_against_complex_numbers(pairs: str, scaling: YarnScaling | None) -> None:
    config = RopeConfig(10, base=100.0, pairs=pairs, scaling=scaling)
    x = torch.randn(4, 3, 14, generator=torch.Generator().manual_seed(0))
    positions = [0, 1, 17, 4000]
    expected = _by_complex_numbers(x, positions, config)
    computed = RopeTable.make(config, "cpu")
    torch.testing.assert_close(
        apply_rope(x, torch.tensor(positions), computed, torch.float64), expected, rtol=0, atol=1e-12
    )
    tabulated = RopeTable.make(config, "cpu", 4001)
    # The table is made from float64 frequencies, the computed angles from float32 ones.
    torch.testing.assert_close(
        apply_rope(x, torch.tensor(positions), tabulated, torch.float64), expected, rtol=0, atol=4000 * 2.0**-22
    )


def test_table_holds_cos_then_sin() -> None:
    table = RopeTable.make(RopeConfig(4, base=100.0), "cpu", 8).cos_sin
    assert table is not None
    assert table.dtype == torch.float32
    assert table[3].tolist() == pytest.approx([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)], rel=1e-6)


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 1, 64, dtype=torch.float64, generator=generator).expand(2, 1, 64) for _ in range(2))
    table = RopeTable.make(RopeConfig(64), "cpu")
    q_rotated, _ = fi.rope(q, None, torch.tensor([7, 1007]), table)
    k_rotated, _ = fi.rope(k, None, torch.tensor([3, 1003]), table)
    near, far = (q_rotated * k_rotated).sum(-1).flatten().tolist()
    assert near == pytest.approx(far, abs=1e-9)


@conformance.parametrize("reference", ["rope"])
def test_reference_conforms(case: conformance.BoundCase) -> None:
    case()


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RopeTable]:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(5, heads, 16, generator=generator).to(dtype) for heads in (4, 2))
    return q, k, torch.tensor([3, 0, 9, 9, 1]), RopeTable.make(RopeConfig(8), "cpu", 10)


def test_in_place_equals_out_of_place() -> None:
    q, k, positions, table = _inputs(torch.bfloat16)
    q_before, k_before = q.clone(), k.clone()
    q_new, k_new = fi.rope(q, k, positions, table)
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_before)
    q_same, k_same = fi.rope(q, k, positions.int(), table, q_out=q, k_out=k)
    assert q_same is q
    assert k_same is k
    assert torch.equal(q, q_new)
    assert torch.equal(k, k_new)
    assert torch.equal(q[..., 8:], q_before[..., 8:])


def test_no_tokens() -> None:
    q, k, positions, table = _inputs()
    q_out, k_out = fi.rope(q[:0], k[:0], positions[:0], table)
    assert q_out.shape == (0, 4, 16)
    assert k_out is not None
    assert k_out.shape == (0, 2, 16)


@pytest.mark.parametrize("position", [10, -1])
def test_position_outside_the_table_is_named_on_a_cpu(position: int) -> None:
    q, k, positions, table = _inputs()
    positions[2] = position
    with pytest.raises(fi.IndexCheckError, match=rf"positions\[2\]: {position} is outside its limit"):
        fi.rope(q, k, positions, table)


@pytest.mark.parametrize(("position", "limit"), [(10, 9), (-1, 0)])
def test_checked_mode_names_the_position(position: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, positions, table = _inputs()
    positions[2] = position
    monkeypatch.setenv("FI_CHECK", "1")
    settings.cache_clear()
    checks.reset()
    try:
        with pytest.raises(fi.IndexCheckError, match=rf"positions\[2\]: {position} is outside its limit {limit}"):
            fi.rope(q, k, positions, table)
        positions[2] = 9
        fi.rope(q, k, positions, table)
    finally:
        monkeypatch.undo()
        settings.cache_clear()
        checks.reset()


def test_bad_arguments_are_named() -> None:
    q, k, positions, table = _inputs()
    wide = RopeTable.make(RopeConfig(32), "cpu")
    for argument, call in {
        "q": lambda: fi.rope(q[0], k, positions, table),
        "q.dtype": lambda: fi.rope(q.int(), k, positions, table),
        "k": lambda: fi.rope(q, k[:4], positions, table),
        "k.dtype": lambda: fi.rope(q, k.half(), positions, table),
        "positions.dtype": lambda: fi.rope(q, k, positions.float(), table),
        "positions": lambda: fi.rope(q, k, positions[:4], table),
        "table.config.rotary_dim": lambda: fi.rope(q, k, positions, wide),
        "q_out": lambda: fi.rope(q, k, positions, table, q_out=k),
        "k_out": lambda: fi.rope(q, None, positions, table, k_out=k),
        "k_out.dtype": lambda: fi.rope(q, k, positions, table, k_out=k.double()),
        "table.inv_freq": lambda: fi.rope(q, k, positions, replace(table, inv_freq=table.inv_freq.double())),
        "table.cos_sin": lambda: fi.rope(q, k, positions, replace(table, cos_sin=table.cos_sin[:, :-2])),
        "positions.device": lambda: fi.rope(q, k, positions.to("meta"), table),
    }.items():
        with pytest.raises(fi.ArgumentError) as caught:
            call()
        assert caught.value.argument == argument
    with pytest.raises(fi.ArgumentError, match="contiguous"):
        fi.rope(q.transpose(0, 2).contiguous().transpose(0, 2), k, positions, table)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("rope.rotary_dim", lambda: RopeConfig(7)),
        ("rope.rotary_dim", lambda: RopeConfig(8.0)),
        ("rope.pairs", lambda: RopeConfig(8, pairs="both")),
        ("rope.base", lambda: RopeConfig(8, base=0.0)),
        ("rope.base", lambda: RopeConfig(8, base=1.0)),
        ("rope.base", lambda: RopeConfig(8, base=math.inf)),
        ("rope.base", lambda: RopeConfig(8, base=math.nan)),
        ("rope.scaling", lambda: RopeConfig(8, scaling={"factor": 2.0})),
        ("rope.scaling.factor", lambda: fi.LinearScaling(0.5)),
        ("rope.scaling.factor", lambda: fi.LinearScaling(math.inf)),
        ("rope.scaling.factor", lambda: fi.Llama3Scaling(math.nan)),
        ("rope.scaling.original_max_position", lambda: fi.Llama3Scaling(original_max_position=0)),
        ("rope.scaling.low_freq_factor, high_freq_factor", lambda: fi.Llama3Scaling(low_freq_factor=4.0)),
        ("rope.scaling.factor", lambda: YarnScaling(0.9, 100)),
        ("rope.scaling.original_max_position", lambda: YarnScaling(2.0, 0)),
        ("rope.scaling.beta_slow, beta_fast", lambda: YarnScaling(2.0, 100, beta_slow=0.0)),
        ("rope.scaling.beta_slow, beta_fast", lambda: YarnScaling(2.0, 100, beta_fast=0.5)),
        ("rope.scaling.attention_factor", lambda: YarnScaling(2.0, 100, attention_factor=math.nan)),
        ("max_position", lambda: RopeTable.make(RopeConfig(8), "cpu", 0)),
        ("max_position", lambda: RopeTable.make(RopeConfig(8), "cpu", 2.5)),
    ],
)
def test_bad_configurations_are_named(argument: str, make: Callable[[], object]) -> None:
    with pytest.raises(fi.ArgumentError) as caught:
        make()
    assert caught.value.argument == argument


def test_cost_counts_every_byte_once() -> None:
    from fi_core.ops.rope import cost

    q, k, positions, table = _inputs(torch.bfloat16)
    moved = 2 * (q.numel() + k.numel()) * 2 + positions.numel() * 8 + positions.numel() * 8 * 4
    assert cost(5, 6, 16, 8, torch.bfloat16, table=True).num_bytes == moved


def test_compiled_calls_see_one_operator() -> None:
    q, k, positions, _ = _inputs()
    table = RopeTable.make(RopeConfig(8, scaling=YarnScaling(4.0, 64)), "cpu")
    compiled = torch.compile(lambda q, k, p: fi.rope(q, k, p, table), backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(q, k, positions), fi.rope(q, k, positions, table), strict=True):
        assert torch.equal(actual, expected)
