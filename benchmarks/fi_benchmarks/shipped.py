"""The CUDA backend's shipped specs as benchmarks choose and name them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

FIRST = "first call"
"""The measure by which pipeline.json (bench_pipeline.py) has each spec's first call, in microseconds."""


def fields_of(record: Any) -> Iterator[tuple[str, str]]:
    """The fields of a spec as text, those of its records among them."""
    for item in fields(record):
        value = getattr(record, item.name)
        if is_dataclass(value) and not hasattr(value, "stem"):
            yield from fields_of(value)
        else:
            yield item.name, str(value).replace("torch.", "")


def names_of(specs: Sequence[Any]) -> dict[Any, str]:
    """A short name for each spec: its class, and the fields that differ from the most frequent value in ``specs``."""
    values: dict[tuple[type, str], Counter[str]] = {}
    for spec in specs:
        for name, text in fields_of(spec):
            values.setdefault((type(spec), name), Counter())[text] += 1
    usual = {key: counted.most_common(1)[0][0] for key, counted in values.items()}
    return {
        spec: " ".join(
            [
                type(spec).__name__,
                *(f"{name}={text}" for name, text in fields_of(spec) if text != usual[type(spec), name]),
            ]
        )
        for spec in specs
    }


@dataclass(frozen=True)
class Selection:
    """Of the shipped specs those of ``stems``, or of all where none is named; with ``slowest`` as many alone: first those
    that the run of ``earlier``, a pipeline.json, does not have, then those whose first calls took longest in it."""

    stems: tuple[str, ...] = ()
    slowest: int = 0
    earlier: Path | None = None

    @property
    def takes_all(self) -> bool:
        return not self.stems and not self.slowest

    def words(self) -> list[str]:
        """The command line that asks for it."""
        words = [word for stem in self.stems for word in ("--stem", stem)]
        return [*words, *(("--slowest", str(self.slowest), str(self.earlier)) if self.slowest else ())]

    def specs(self) -> list[Any]:
        from fi_cuda.shipped import shipped_specs

        shipped = shipped_specs()
        chosen = [spec for spec in shipped if not self.stems or spec.stem in self.stems]
        if not self.slowest:
            return chosen
        assert self.earlier is not None
        took = {item["case"]: item[FIRST] for item in json.loads(self.earlier.read_text())["specs"]}
        names = names_of(shipped)
        return sorted(chosen, key=lambda spec: -took.get(names[spec], math.inf))[: self.slowest]
