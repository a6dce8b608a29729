"""Pictures of result rows (matplotlib): bars of all implementations a case, and a roofline with the measured ceilings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import CaseRows, by_group, microseconds
from .results import Rows
from .runner import CEILING, OURS, PEER

COLOURS = {OURS: "#1f6fb4", PEER: "#e08a2e", CEILING: "#9aa0a6"}
LABELS = {OURS: "fi", PEER: "peers", CEILING: "ceilings of the same run"}
CASES_A_PAGE = 8
_BAR_INCHES, _CASE_INCHES, _WIDTH_INCHES, _DPI = 0.24, 0.5, 9.0, 100
_MARKERS = "osD^vPX*"


class PlotError(RuntimeError):
    """Pictures cannot be made here; the message says why."""


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        text = "pictures need matplotlib, which is not installed (pip install matplotlib); tables are made without it"
        raise PlotError(text) from error


def _bars_of(case: CaseRows) -> list[dict[str, Any]]:
    return [row for kind in (OURS, PEER, CEILING) for row in case.timed[kind]]


def _draw_case(axes: Any, case: CaseRows) -> None:
    bars = _bars_of(case)
    longest = max(row["us"] for row in bars)
    for place, row in enumerate(bars):
        spread = [[max(0.0, row["us"] - row["p10"])], [max(0.0, row["p90"] - row["us"])]]
        axes.barh(place, row["us"], color=COLOURS[row["kind"]], xerr=spread, ecolor="#333333", height=0.72)
        end = max(row["us"], row["p90"]) + 0.012 * longest
        axes.text(end, place, f"{microseconds(row['us'])} µs", va="center", fontsize=7.5)
    axes.set_yticks(range(len(bars)), [row["impl"] for row in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max(max(row["us"], row["p90"]) for row in bars))
    axes.set_title(case.name, fontsize=9, loc="left", fontweight="bold")
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(group: str, cases: Sequence[CaseRows], path: Path) -> None:
    """Bars of ``cases`` below each other, each with a scale of its own: shorter is better."""
    pyplot = _pyplot()
    patches = importlib.import_module("matplotlib.patches")
    heights = [_CASE_INCHES + _BAR_INCHES * len(_bars_of(case)) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(_WIDTH_INCHES, sum(heights) + 0.9),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
        squeeze=False,
    )
    figure.get_layout_engine().set(h_pad=0.09)
    for each, case in zip(axes[:, 0], cases, strict=True):
        _draw_case(each, case)
    axes[-1, 0].set_xlabel("µs, cold L2; whiskers from the 10th to the 90th percentile", fontsize=8)
    kinds = [kind for kind in COLOURS if any(case.timed[kind] for case in cases)]
    handles = [patches.Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(group, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)


def _rates(rows: Rows) -> tuple[float, float]:
    """Bytes and operations a second of the ceilings' rows."""
    found = []
    for word, amount in (("read", "num_bytes"), ("mm", "num_flops")):
        rates = [
            row[amount] / row["us"] * 1e6 for row in rows if row["case"].startswith(f"ceiling {word}") and "us" in row
        ]
        if not rates:
            raise PlotError(f'the roofline needs the rows "ceiling {word} ..." (the group "ceilings")')
        found.append(max(rates))
    return found[0], found[1]


def draw_roofline(rows: Rows, path: Path) -> None:
    """Operations a second over operations a byte: ours filled, the best peer hollow, a marker a group."""
    pyplot = _pyplot()
    read, matmul = _rates(rows)
    figure, axes = pyplot.subplots(figsize=(_WIDTH_INCHES, 6.0), layout="constrained")
    intensities: list[float] = []
    groups = [(group, cases) for group, cases in by_group(rows).items() if group != "ceilings"]
    for place, (group, cases) in enumerate(groups):
        marker = _MARKERS[place % len(_MARKERS)]
        for kind in (PEER, OURS):
            best = [row for case in cases if (row := case.best(kind)) is not None and row.get("num_flops")]
            x = [row["num_flops"] / row["num_bytes"] for row in best]
            y = [row["num_flops"] / row["us"] * 1e6 for row in best]
            face, label = (f"C{place}", group) if kind == OURS else ("none", None)
            axes.plot(x, y, marker, ms=6, mfc=face, mec=f"C{place}", ls="none", alpha=0.85, label=label)
            intensities += x
    low, high = min([*intensities, 1.0]) / 2, max([*intensities, matmul / read]) * 3
    knee = matmul / read
    axes.plot([low, knee, high], [low * read, matmul, matmul], color="#444444", lw=1.2)
    slope = f"read {read / 1e9:.0f} GB/s"
    middle = (low * knee) ** 0.5  # the label stands above the line, where no call can be
    axes.annotate(slope, (middle, middle * read), (-6, 2), textcoords="offset points", fontsize=8, ha="right")
    top = f"bf16 matmul {matmul / 1e12:.0f} TFLOP/s"
    axes.annotate(top, (high, matmul), (-4, 5), textcoords="offset points", fontsize=8, ha="right")
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte (fewest possible bytes)", ylabel="operations a second"
    )
    axes.set_title(
        "Roofline: filled fi, hollow the best peer; calls without operations are left out", fontsize=10, loc="left"
    )
    axes.grid(True, which="major", lw=0.3)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)


def draw_all(rows: Rows, folder: Path) -> list[Path]:
    """Every picture: GROUP-N.png for each eight cases, and roofline.png where the ceilings were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    _pyplot()
    made = []
    for group, cases in by_group(rows).items():
        drawable = [case for case in cases if _bars_of(case)]
        for page, start in enumerate(range(0, len(drawable), CASES_A_PAGE), 1):
            made.append(folder / f"{group}-{page}.png")
            draw_bars(group, drawable[start : start + CASES_A_PAGE], made[-1])
    if any(row["group"] == "ceilings" for row in rows) and any(row["group"] != "ceilings" for row in rows):
        made.append(folder / "roofline.png")
        draw_roofline(rows, made[-1])
    return made
