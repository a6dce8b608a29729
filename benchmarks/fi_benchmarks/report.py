"""Markdown tables of result rows: a line a case, ours beside the best peer and the ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Rows
from .runner import AGAIN, CEILING, OURS, PEER

_HEADER = (
    "case",
    "ours",
    "µs",
    "p10 to p90",
    "warm µs",
    "of ceiling",
    "best peer",
    "µs",
    "ratio",
    "ceiling µs",
    "others, µs",
)


@dataclass(frozen=True)
class CaseRows:
    """The rows of one case by kind, those with times sorted by them."""

    name: str
    timed: Mapping[str, Sequence[dict[str, Any]]]
    failed: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, name: str, rows: Rows) -> CaseRows:
        timed = {
            kind: sorted((row for row in rows if row["kind"] == kind and "us" in row), key=lambda row: row["us"])
            for kind in (OURS, PEER, CEILING, AGAIN)
        }
        return cls(name, timed, [row for row in rows if "us" not in row])

    def best(self, kind: str) -> dict[str, Any] | None:
        """The fastest of a kind; of ours the plain calls, not their variants."""
        plain = [row for row in self.timed[kind] if "+" not in row["impl"]]
        return plain[0] if plain else None

    @property
    def noise(self) -> float | None:
        """How far the first implementation's two timings lie apart, as a share."""
        for row in self.timed[AGAIN]:
            name = row["impl"].removesuffix(" (again)")
            for kind in (OURS, PEER):
                for other in self.timed[kind]:
                    if other["impl"] == name:
                        return abs(float(row["us"]) / float(other["us"]) - 1.0)
        return None


def by_group(rows: Rows) -> dict[str, list[CaseRows]]:
    """Cases by group, both in the order of their first rows."""
    names: dict[str, dict[str, Rows]] = {}
    for row in rows:
        names.setdefault(row["group"], {}).setdefault(row["case"], []).append(row)
    return {group: [CaseRows.of(name, found) for name, found in cases.items()] for group, cases in names.items()}


def microseconds(value: float) -> str:
    """Three digits or the whole microseconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(case: CaseRows) -> list[str]:
    ours, peer, ceiling = (case.best(kind) for kind in (OURS, PEER, CEILING))
    cells = [case.name]
    if ours is None:
        cells += ["none", "", "", "", ""]
    else:
        spread = f"{microseconds(ours['p10'])} to {microseconds(ours['p90'])}" if "p10" in ours else ""
        share = f"{ours['share_of_ceiling']:.0%}" if "share_of_ceiling" in ours else ""  # whole steps have none
        warm = microseconds(ours["warm_us"]) if "warm_us" in ours else ""
        cells += [ours["impl"], microseconds(ours["us"]), spread, warm, share]
    cells += ["", ""] if peer is None else [peer["impl"], microseconds(peer["us"])]
    cells += [f"{peer['us'] / ours['us']:.2f}" if ours and peer else ""]
    cells += ["" if ceiling is None else f"{microseconds(ceiling['us'])} ({ceiling['impl']})"]
    shown = [item for item in (ours, peer, ceiling) if item is not None]
    others = [row for kind in (OURS, PEER, CEILING) for row in case.timed[kind] if row not in shown]
    return [*cells, ", ".join(f"{row['impl']} {microseconds(row['us'])}" for row in others)]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = "|".join("---" for _ in header)
    return [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def _ceiling_lines(cases: Sequence[CaseRows]) -> list[list[str]]:
    lines = []
    for case in cases:
        for row in case.timed[CEILING]:
            rate = f"{row['num_bytes'] / row['us'] / 1e3:.0f} GB/s"
            if row["num_flops"] > 100 * row["num_bytes"]:
                rate = f"{row['num_flops'] / row['us'] / 1e6:.0f} TFLOP/s"
            if "launch" in case.name:
                rate = ""
            lines.append([case.name, row["impl"], microseconds(row["us"]), microseconds(row["warm_us"]), rate])
    return lines


def markdown(rows: Rows) -> str:
    """Tables of every group, what they mean, and every implementation that failed."""
    said = sorted({f"{row['device']}; commit {row['commit']}; {row['versions']}" for row in rows if "device" in row})
    text = ["# Benchmarks", "", *(f"- {line}" for line in said), ""]
    text += [
        "Microseconds of CUDA-graph replays between events, the L2 filled with clean foreign lines before each (warm:"
    ]
    text += [
        "right after another run), medians. Ratio: the best peer's time over ours, above 1 means that ours is faster.",
        "",
    ]
    for group, cases in by_group(rows).items():
        text += [f"## {group}", ""]
        if group == "ceilings":
            text += [*_table(("case", "by", "µs", "warm µs", "rate"), _ceiling_lines(cases)), ""]
            continue
        text += [*_table(_HEADER, (_line(case) for case in cases)), ""]
        noises = [case.noise for case in cases if case.noise is not None]
        if noises:
            median = sorted(noises)[len(noises) // 2]
            text += [
                f"Timed twice, the same implementation differs by {median:.1%} (median), {max(noises):.1%} at most.",
                "",
            ]
        failed = [row for case in cases for row in case.failed]
        text += [f"- {row['case']}, {row['impl']}: {row['error']}" for row in failed] + ([""] if failed else [])
    return "\n".join(text)


def write_report(rows: Rows, folder: Path) -> Path:
    """Write the tables to FOLDER/report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text(markdown(rows))
    return path
