"""Inputs of the sampling cases: hostile rows whose outcome does not hang on the last bits of an exponential.

Exponentials round differently from device to device, so a draw, or a filter's limit, that falls within rounding of a
boundary has no single right answer. Rows are drawn again until the outcome is safe: the random target stays 2^-18 of
the mass away from every boundary, and the kept tokens do not change when every weight is disturbed by about 2^-17,
sharpened, flattened or at random (kernels err by about 2^-22). Everything is built on the CPU and then copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...random import PURPOSE_DRAW, random_bits, scale_bits
from ...reference.sampling.draw import Columns, map_columns
from ...reference.sampling.filters import keep_mask, valid_filters
from ...reference.sampling.masses import Weights, to_mass
from ...reference.sampling.penalties import penalize_logits
from ...sampling import NO_PENALTIES, DrawKeys, FilterOrder, FilterParams, PenaltyParams
from .penalty_inputs import PenaltyShape, random_penalties, random_slots, spread, spread_penalties

RowMaker = Callable[[int, int, torch.Generator], Tensor]

_MARGIN_BITS = 18
_DISTURBANCE = 2.0**-17
_ATTEMPTS = 200

COLUMN_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "typical_p": torch.float32,
}


def on_device(record: Columns, device: torch.device) -> Columns:
    """``record`` with its tensors on ``device``."""
    return map_columns(record, lambda column: column.to(device))


def noise(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Normal values of standard deviation 3."""
    return torch.randn((num_rows, vocab_size), generator=generator) * 3


def flat(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """One value everywhere."""
    return torch.full((num_rows, vocab_size), 0.25)


def tied(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A few values, so that ranks are decided by index."""
    return (noise(num_rows, vocab_size, generator) / 2).round()


def masked(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Half of the logits are -inf, never the first."""
    values = noise(num_rows, vocab_size, generator)
    dropped = torch.rand(values.shape, generator=generator) < 0.5
    dropped[:, 0] = False
    return values.masked_fill(dropped, -torch.inf)


def single(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """All but one logit are -inf."""
    place = torch.randint(0, vocab_size, (num_rows, 1), generator=generator)
    return torch.full((num_rows, vocab_size), -torch.inf).scatter_(1, place, -5.0)


def huge(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Logits of about 1e30."""
    return noise(num_rows, vocab_size, generator) * 1e30


def unusable(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A NaN, a +inf, or all -inf, by turns."""
    values = noise(num_rows, vocab_size, generator)
    values[0::3, -1] = torch.nan
    values[1::3, vocab_size // 2] = torch.inf
    values[2::3] = -torch.inf
    return values


def hostile(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Rows of every kind by turns."""
    makers = (noise, tied, masked, huge, flat, unusable, single)
    values = torch.empty(num_rows, vocab_size)
    for kind, maker in enumerate(makers):
        rows = values[kind :: len(makers)]
        values[kind :: len(makers)] = maker(rows.shape[0], vocab_size, generator)
    return values


@dataclass(frozen=True)
class DrawCase:
    """One case of ``sample`` or ``filter_logits``. ``columns``: filter values, given to the rows by turns; ``repeats``:
    draws a row of logits (then ``rows`` maps them in mixed order); ``after``: foreign elements after each row; ``parts``:
    penalties; ``slotted``: parameters lie in columns with gaps, and some outputs have none."""

    name: str
    num_rows: int = 13
    vocab_size: int = 97
    dtype: torch.dtype = torch.float32
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    order: FilterOrder = "sequential"
    make: RowMaker = noise
    repeats: int = 1
    after: int = 0
    parts: tuple[str, ...] = ()
    slotted: bool = False

    @property
    def filters(self) -> frozenset[str]:
        """The request field "filters"."""
        return frozenset(self.columns) - {"temperature"}

    @property
    def tags(self) -> frozenset[str]:
        hostile_rows = self.make is not noise or self.after % 2 or self.vocab_size in (1, 2)
        return frozenset({"hostile"} if hostile_rows else ())

    @property
    def num_outputs(self) -> int:
        return self.num_rows * self.repeats


@dataclass(frozen=True)
class DrawInputs:
    """A case's inputs on the CPU; ``rows`` is None when the case maps no rows, ``slots`` when it has no columns."""

    logits: Tensor
    filters: FilterParams
    keys: DrawKeys
    rows: Tensor | None
    penalties: PenaltyParams = NO_PENALTIES
    slots: Tensor | None = None

    def in_columns(self, slots: Tensor) -> DrawInputs:
        """The same with the parameters of output n at ``slots[n]``."""
        keys = DrawKeys(spread(self.keys.seed, slots), spread(self.keys.sample, slots), self.keys.position)
        filters = map_columns(self.filters, lambda column: spread(column, slots))
        return DrawInputs(self.logits, filters, keys, self.rows, spread_penalties(self.penalties, slots), slots)


def filter_columns(case: DrawCase) -> FilterParams:
    """The case's filter values, cycled over its outputs."""
    turns = torch.arange(case.num_outputs)
    columns = {
        name: torch.tensor(values, dtype=COLUMN_DTYPES[name])[turns % len(values)]
        for name, values in case.columns.items()
    }
    return FilterParams(**columns, order=case.order)


def _random_keys(count: int, generator: torch.Generator) -> DrawKeys:
    seed = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    sample = torch.randint(0, 5, (count,), generator=generator).to(torch.int32)
    position = torch.randint(0, 2**33, (count,), generator=generator)
    return DrawKeys(seed, sample, position)


def draw_inputs(case: DrawCase, seed: int) -> DrawInputs:
    """Random inputs of ``case`` whose outcome is safe in every row; unusable and greedy rows always are."""
    generator = torch.Generator().manual_seed(seed)
    filters = filter_columns(case)
    logits = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
    keys = _random_keys(case.num_outputs, generator)
    rows = None
    if case.repeats > 1:
        rows = torch.arange(case.num_rows).repeat(case.repeats)[torch.randperm(case.num_outputs, generator=generator)]
    source = torch.arange(case.num_rows) if rows is None else rows
    shape = PenaltyShape(case.parts, case.num_outputs, case.vocab_size, "sparse", overfull=True, in_steps=True)
    penalties = random_penalties(shape, generator) if case.parts else NO_PENALTIES
    for _ in range(_ATTEMPTS):
        changed = torch.empty_like(logits[source])
        penalize_logits(logits[source], penalties, changed)
        unsafe = ~_safe(changed, filters, keys, generator)
        if not unsafe.any():
            found = DrawInputs(logits, filters, keys, None if rows is None else rows.to(torch.int32), penalties)
            return found.in_columns(random_slots(case.num_outputs, generator)) if case.slotted else found
        fresh = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
        logits[source[unsafe]] = fresh[source[unsafe]]
        fresh_keys = _random_keys(case.num_outputs, generator)
        for name in ("seed", "sample", "position"):
            getattr(keys, name)[unsafe] = getattr(fresh_keys, name)[unsafe]
    raise RuntimeError(f"case {case.name}: no safe inputs for outputs {unsafe.nonzero().ravel().tolist()}")


def _safe(logits: Tensor, filters: FilterParams, keys: DrawKeys, generator: torch.Generator) -> Tensor:
    """bool [N]: which outputs do not depend on the rounding of an exponential."""
    greedy = torch.zeros(logits.shape[0], dtype=torch.bool)
    temperature = filters.temperature
    if temperature is not None:
        greedy = temperature <= 0
        temperature = torch.where(greedy, 1.0, temperature)
    weights = Weights.of(logits, temperature)
    mask = keep_mask(weights, filters)
    mass = weights.mass if mask is None else weights.mass * mask
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1]
    target = scale_bits(random_bits(keys, PURPOSE_DRAW), total)
    distance = (cumulative - target.unsqueeze(1)).abs().amin(dim=1)
    # A row with one possible token has one outcome, wherever its target falls.
    alone = (mass > 0).sum(dim=1) == 1
    safe = alone | (distance > (total >> _MARGIN_BITS))
    if mask is not None:
        for changed in _disturbed(weights, generator):
            other = keep_mask(changed, filters)
            assert other is not None
            safe &= (other ^ mask).sum(dim=1) == 0
    return safe | greedy | ~weights.usable | ~valid_filters(filters, logits.shape[0], logits.device)


def _disturbed(weights: Weights, generator: torch.Generator) -> list[Weights]:
    """``weights`` with other roundings of the exponential: sharpened, flattened, and four at random, equal logits
    always keeping equal weights and the largest keeping 1."""
    exponents = [torch.full_like(weights.weight, 1 + sign * _DISTURBANCE) for sign in (1, -1)]
    for _ in range(4):
        offset = torch.rand((), generator=generator) * 100
        pseudo_random = ((weights.shortfall + offset) * 12.9898).sin() * 43758.5453
        exponents.append(1 + (pseudo_random - pseudo_random.floor() - 0.5) * 2 * _DISTURBANCE)
    changed = []
    for exponent in exponents:
        exact = torch.where(weights.shortfall.isfinite(), -weights.shortfall * exponent, -torch.inf)
        weight = exact.to(torch.float64).exp().to(torch.float32)
        changed.append(replace(weights, weight=weight, mass=to_mass(weight)))
    return changed
