"""Rules, requests, kernel entries and operations: what is rejected, and in which words."""

import fi_core as fi
import pytest
import torch
from fi_core.contract import (
    Anything,
    Between,
    Condition,
    KernelEntry,
    OneOf,
    Operation,
    Request,
    SubsetOf,
    Target,
    check_entry,
)
from fi_core.ops import OPERATIONS

CPU, HOPPER, AMPERE = Target("cpu"), Target("cuda", (9, 0)), Target("cuda", (8, 0))
TOY = Operation("toy", "a toy", {"dtype": "d", "size": "s"}, {"dtype": torch.float32, "size": 4}, lambda: iter(()))


def _entry(**changes: object) -> KernelEntry:
    fields = {
        "op": "toy",
        "name": "toy",
        "backend": "b",
        "rules": {"dtype": OneOf(torch.float32), "size": Between(1, 8, 2)},
        "load": lambda: None,
        "devices": ("cpu", "cuda"),
    }
    return KernelEntry(**{**fields, **changes})


@pytest.mark.parametrize(
    ("rule", "served", "refused"),
    [
        (Anything(), [None, 1, "x", frozenset()], []),
        (OneOf(1, None, "a"), [1, None, "a"], [2, "b"]),
        (SubsetOf("a", "b"), [frozenset(), frozenset("a"), frozenset("ab"), ("a",)], [frozenset("ac"), ("c",)]),
        (SubsetOf(), [frozenset()], [frozenset("a")]),
        (Between(2), [2, 10**9], [1, None]),
        (Between(2, 6, 2), [2, 4, 6], [0, 1, 3, 5, 7, 8, None]),
    ],
)
def test_rules(rule: fi.Rule, served: list[object], refused: list[object]) -> None:
    assert [value for value in served if rule.reject(value) is not None] == []
    for value in refused:
        assert str(rule) in (rule.reject(value) or ""), value


def test_rule_texts() -> None:
    assert str(OneOf(torch.float16, "a", None)) == "float16, 'a', None"
    assert str(Between(1)) == "1 or more"
    assert str(Between(8, 256, 8)) == "8 to 256, multiples of 8"
    assert SubsetOf("a", "b").reject(frozenset("bc")) == "'c' not among 'a', 'b'"
    assert str(SubsetOf()) == "none"
    assert OneOf(torch.float16).reject(torch.bfloat16) == "bfloat16 is not one of float16"


def test_request_is_a_value() -> None:
    first = Request.of("toy", CPU, size=4, dtype=torch.float32)
    second = Request.of("toy", CPU, dtype=torch.float32, size=4)
    assert first == second
    assert hash(first) == hash(second)
    assert first["size"] == 4
    assert str(first) == "toy(dtype=float32, size=4) on cpu"
    assert str(HOPPER) == "cuda sm_90"


def test_operation_demands_every_field() -> None:
    with pytest.raises(fi.PluginError, match="toy"):
        TOY.request(CPU, dtype=torch.float32)
    with pytest.raises(fi.PluginError, match="toy"):
        TOY.request(CPU, dtype=torch.float32, size=4, other=1)


def test_entry_lists_every_reason() -> None:
    entry = _entry(min_capability=(9, 0))
    good = {"dtype": torch.float32, "size": 4}
    assert entry.reject(TOY.request(HOPPER, **good)) == []
    assert entry.reject(TOY.request(CPU, **good)) == []
    reasons = entry.reject(TOY.request(AMPERE, dtype=torch.float16, size=3))
    assert [reason.split(":")[0] for reason in reasons] == ["capability", "dtype", "size"]
    assert "below sm_90" in reasons[0]
    assert _entry(devices=("cuda",)).reject(TOY.request(CPU, **good)) == ["device: cpu is not one of cuda"]


def test_conditions_are_asked_last() -> None:
    asked = []
    condition = Condition("size divisible by 4", lambda request: asked.append(request) or request["size"] % 4 == 0)
    entry = _entry(conditions=(condition,))
    assert entry.reject(TOY.request(CPU, dtype=torch.float32, size=6)) == ["needs size divisible by 4"]
    assert entry.reject(TOY.request(CPU, dtype=torch.float32, size=8)) == []
    # A condition may assume that each field is within its rule.
    assert len(asked) == 2
    assert entry.reject(TOY.request(CPU, dtype=torch.float16, size=6)) == ["dtype: float16 is not one of float32"]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": "unknown"}, "unknown operation 'unknown'"),
        ({"rules": {"dtype": Anything()}}, r"rules missing for \['size'\]"),
        ({"rules": {"dtype": Anything(), "size": Anything(), "color": Anything()}}, r"unknown rules \['color'\]"),
        ({"devices": ()}, "declares no device"),
    ],
)
def test_incomplete_entries_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(fi.PluginError, match=words):
        check_entry(_entry(**changes), {"toy": TOY})


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda item: item.name)
def test_operations_are_complete(operation: Operation) -> None:
    assert set(operation.typical) == set(operation.fields)
    assert all(operation.fields.values())
    request = operation.request(CPU, **operation.typical)
    assert hash(request) == hash(operation.request(CPU, **operation.typical))


def test_operation_names_are_unique() -> None:
    names = [operation.name for operation in OPERATIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda item: item.name)
def test_conformance_cases_are_well_formed(operation: Operation) -> None:
    cases = list(operation.cases())
    assert cases
    assert len(cases) == len({case.name for case in cases})
    for case in cases:
        operation.request(CPU, **case.values)
        assert case.tags <= {"hostile", "large"}


def test_target_of_a_cpu() -> None:
    assert fi.target_of("cpu") == CPU
    assert fi.target_of(torch.device("cpu")) == CPU
