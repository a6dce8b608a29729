"""The support matrix follows from declarations alone."""

import types

import fi_core as fi
import pytest
import torch
from fi_core.contract import Anything, KernelEntry, OneOf, SubsetOf
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.ops import OPERATIONS
from fi_core.registry import KernelRegistry, registry
from fi_core.support_matrix import BEGIN, END, ROWS, support_matrix, update_text


def _table(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.fixture
def current() -> KernelRegistry:
    made = KernelRegistry(OPERATIONS)
    rules = dict.fromkeys(made.operations["attention"].fields, Anything())
    rules |= {"dtype": OneOf(torch.bfloat16, torch.float16), "features": SubsetOf("lse"), "page_size": OneOf(16)}

    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo("fast", "1.0", "s", 7)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        registry.add(KernelEntry("attention", "a", "fast", rules, lambda: None, ("cuda",), min_capability=(9, 0)))
        tree = dict.fromkeys(made.operations["verify_tree"].fields, Anything())
        registry.add(KernelEntry("verify_tree", "t", "fast", tree, lambda: None, ("cuda",), min_capability=(10, 0)))

    made.register_plugin(types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels), "fast")
    from fi_core.reference import plugin

    made.register_plugin(plugin, "reference")
    return made


def test_cells_follow_the_rules(current: KernelRegistry) -> None:
    table = _table(support_matrix(current))
    assert table["operation"] == ["fast (cuda)", "reference (cuda)"]
    assert table["attention: decode"] == ["bf16 fp16", "bf16 fp16 fp32"]
    assert table["attention: log-sum-exp output"][0] == "bf16 fp16"
    assert table["attention: sinks"] == ["-", "bf16 fp16 fp32"]
    assert table["attention: pages of 1 token"][0] == "-"
    assert table["rmsnorm"] == ["-", "bf16 fp16 fp32"]
    # Declared for a newer device than the matrix is about.
    assert table["verify_tree"] == ["-", "yes"]


def test_every_operation_has_a_row_and_every_change_a_field() -> None:
    operations = registry().operations
    assert set(ROWS) <= set(operations)
    for name, rows in ROWS.items():
        for changes in rows.values():
            assert set(changes) <= set(operations[name].fields)
    titles = [title.split(":")[0] for title in _table(support_matrix())]
    assert set(operations) <= set(titles)


def test_the_reference_serves_every_row() -> None:
    table = _table(support_matrix())
    column = next(index for index, name in enumerate(table["operation"]) if name.startswith("reference"))
    assert [title for title, cells in table.items() if cells[column] == "-"] == []


def test_update_text_replaces_what_stands_between_the_markers() -> None:
    text = f"# Title\n{BEGIN}\nold\n{END}\ntail\n"
    updated = update_text(text, "| new |")
    assert updated == f"# Title\n{BEGIN}\n| new |\n{END}\ntail\n"
    assert update_text(updated, "| new |") == updated


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_update_text_needs_both_markers(text: str) -> None:
    with pytest.raises(fi.ArgumentError, match="markers"):
        update_text(text, "x")
