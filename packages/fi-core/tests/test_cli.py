"""The ``fi`` command: output, exit codes, and errors on stderr."""

import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path

import fi_core as fi
import pytest
import torch
from fi_core.bench import WORKLOADS, Row, bench, table
from fi_core.cli import main
from fi_core.cli.explain import changed_values
from fi_core.contract import KernelEntry, OneOf
from fi_core.explain import parse_target
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.ops import OPERATIONS
from fi_core.registry import KernelRegistry, PluginStatus, registry
from fi_core.settings import settings
from fi_core.support_matrix import BEGIN, END

Captured = pytest.CaptureFixture[str]


def _plugin(name: str, **hooks: object) -> types.SimpleNamespace:
    def wrong(
        x: torch.Tensor, weight: torch.Tensor, eps: float, bias: float, scale: float | None, out: torch.Tensor
    ) -> None:
        out.zero_()

    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo(name, "2.0", f"the {name}", 7)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        rules = {"dtype": OneOf(torch.float32), "hidden_size": OneOf(576), "out_format": OneOf("same")}
        registry.add(KernelEntry("rmsnorm", "wrong", name, rules, lambda: wrong, ("cpu",)))

    marked = {key: hookimpl(hook) for key, hook in hooks.items()}
    return types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels, **marked)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelRegistry]:
    """A registry of the reference alone, in the place of the process's."""
    from fi_core.reference import plugin

    made = KernelRegistry(OPERATIONS)
    info = made.register_plugin(plugin, "reference")
    made.statuses.append(PluginStatus("reference", "fi-core 0.1.0", info, None))
    monkeypatch.setattr(importlib.import_module("fi_core.registry"), "_registry", made)
    yield made
    monkeypatch.undo()


def _add(current: KernelRegistry, plugin: object, name: str) -> None:
    current.statuses.append(PluginStatus(name, f"{name} 2.0", current.register_plugin(plugin, name), None))


def test_doctor_of_a_healthy_installation(current: KernelRegistry, capsys: Captured) -> None:
    _add(current, _plugin("extra", fi_doctor=lambda: ["native module: loaded", "cache: 3 files"]), "extra")
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in (
        f"fi-core {fi.__version__}",
        f"torch {torch.__version__}",
        "device cpu:",
        "plugin reference (fi-core 0.1.0): ",
        f"priority 0, {len(OPERATIONS)} kernels",
        "plugin extra (extra 2.0): the extra; priority 7, 1 kernels",
        "  extra: native module: loaded",
        "  extra: cache: 3 files",
    ):
        assert text in out


def test_doctor_reports_problems_and_settings(
    current: KernelRegistry, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fi_doctor() -> list[str]:
        raise OSError("no such file")

    _add(current, _plugin("extra", fi_doctor=fi_doctor), "extra")
    current.statuses.append(PluginStatus("lost", "lost 0.1", None, "ImportError: nope"))
    monkeypatch.setenv("FI_SHADOW", "0.5")
    monkeypatch.setenv("FI_SHADWO", "1")
    settings.cache_clear()
    try:
        assert main(["doctor"]) == 1
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    out, err = capsys.readouterr()
    assert "2 problems" in err
    assert "problem: plugin lost (lost 0.1): ImportError: nope" in out
    assert "problem: plugin extra: fi_doctor raised OSError: no such file" in out
    assert "setting FI_SHADOW: 0.5" in out
    assert "setting FI_SHADWO: not one of fi-core's" in out


def test_backends(current: KernelRegistry, capsys: Captured) -> None:
    assert main(["backends"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["reference", fi.__version__]
    current.statuses.append(PluginStatus("lost", "lost 0.1", None, "ImportError: nope"))
    assert main(["backends"]) == 1
    assert "lost (lost 0.1): ImportError: nope" in capsys.readouterr().err


def test_explain_prints_choice_and_rejections(current: KernelRegistry, capsys: Captured) -> None:
    _add(current, _plugin("extra"), "extra")
    assert main(["explain", "rmsnorm", "dtype=fp32", "hidden_size=576", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "chosen: extra.wrong" in out
    assert "rejected: reference.rmsnorm: serves it, but extra.wrong was preferred" in out
    assert main(["explain", "rmsnorm", "--device", "cuda:sm_90"]) == 0
    out = capsys.readouterr().out
    assert "on cuda sm_90" in out
    assert "rejected: extra.wrong: device: cuda is not one of cpu" in out


def test_explain_of_what_nobody_serves(current: KernelRegistry, capsys: Captured) -> None:
    assert main(["explain", "attention", "head_dim=0", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no kernel supports attention(" in err
    assert "reference.attention: head_dim: 0 is not 1 or more" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "nope"], "OP: expected one of attention"),
        (["explain", "rmsnorm", "size=3"], "FIELD: expected a field of rmsnorm"),
        (["explain", "rmsnorm", "hidden_size"], "FIELD=VALUE"),
        (["explain", "rmsnorm", "hidden_size=big"], "hidden_size: expected an int or none"),
        (["explain", "rmsnorm", "dtype=Tensor"], "dtype: expected a dtype"),
        (["explain", "attention", "causal=maybe"], "causal: expected true or false"),
        (["explain", "rmsnorm", "--device", "toaster"], "device: expected"),
        (["explain", "rmsnorm", "--backend", "nope"], "unknown backend 'nope'"),
        (["conformance", "--backend", "nope"], "unknown backend 'nope'"),
        (["conformance", "--backend", "reference", "--op", "nope"], "ops: expected"),
        (["conformance", "--backend", "reference", "--device", "toaster"], "device: expected"),
        (["conformance", "--backend", "reference", "--device", "cuda:99"], "device: expected"),
        (["matrix", "--write", "no/such/file"], "FileNotFoundError"),
        (["bench", "--op", "nope", "--device", "cpu"], "ops: expected"),
        (["bench", "--device", "meta"], "device: expected"),
    ],
)
def test_errors_go_to_stderr(current: KernelRegistry, capsys: Captured, arguments: list[str], words: str) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


@pytest.mark.parametrize("arguments", [[], ["nope"], ["conformance"], ["explain"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fi" in capsys.readouterr().err


def test_values_are_parsed_by_the_field() -> None:
    operation = registry().operations["attention"]
    changes = ["dtype=fp16", "causal=false", "features=lse,sinks", "page_size=none", "table=ragged", "max_q_len=7"]
    values = changed_values(operation, changes)
    assert values["dtype"] == torch.float16
    assert values["causal"] is False
    assert values["features"] == frozenset({"lse", "sinks"})
    assert values["page_size"] is None
    assert values["table"] == "ragged"
    assert values["max_q_len"] == 7
    assert changed_values(operation, ["features="])["features"] == frozenset()
    assert changed_values(operation, []) == dict(operation.typical)


def test_targets() -> None:
    assert str(parse_target("cpu")) == "cpu"
    assert parse_target("cuda:sm_90a").capability == (9, 0)
    assert parse_target("cuda:sm_120").capability == (12, 0)


def test_conformance_command(current: KernelRegistry, capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = ["conformance", "--backend", "reference", "--op", "rmsnorm", "--op", "rope", "--case", "plain"]
    assert main([*command, "--json", str(path)]) == 0
    assert "4 passed, 0 failed" in capsys.readouterr().out
    assert json.loads(path.read_text())["counts"]["passed"] == 4
    assert main([*command, "--json", str(tmp_path / "no" / "folder")]) == 1
    shown = capsys.readouterr()
    assert "4 passed" in shown.out and "FileNotFoundError" in shown.err
    assert main([*command, "--list"]) == 0
    assert "rmsnorm/plain_fp32[reference.rmsnorm]" in capsys.readouterr().out
    assert main(["conformance", "--backend", "reference", "--case", "no such case"]) == 1
    assert "no case was executed" in capsys.readouterr().out


def test_conformance_command_fails_with_the_backend(current: KernelRegistry, capsys: Captured) -> None:
    _add(current, _plugin("extra"), "extra")
    assert main(["conformance", "--backend", "extra", "--op", "rmsnorm", "--case", "plain_fp32"]) == 1
    assert "out: first bad at (0, 0): actual 0.0" in capsys.readouterr().out


def test_conformance_command_shares_cases_among_processes(capsys: Captured) -> None:
    command = ["conformance", "--backend", "reference", "--op", "silu_mul"]
    assert main([*command, "--jobs", "2"]) == 0
    shared = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == shared
    assert main([*command, "--jobs", "0"]) == 1
    assert "jobs: expected at least 1" in capsys.readouterr().err


def test_matrix_command(current: KernelRegistry, capsys: Captured, tmp_path: Path) -> None:
    assert main(["matrix"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "README.md"
    path.write_text(f"a\n{BEGIN}\n{END}\nb\n")
    assert main(["matrix", "--write", str(path)]) == 0
    assert path.read_text() == f"a\n{BEGIN}\n{printed}{END}\nb\n"
    path.write_text("no markers")
    assert main(["matrix", "--write", str(path)]) == 1
    assert "markers" in capsys.readouterr().err


def test_bench_command(current: KernelRegistry, capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", "--op", "rmsnorm", "--device", "cpu", "--json", str(path)]) == 0
    assert "reference.rmsnorm" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())
    assert row["op"] == "rmsnorm"
    assert row["p10"] <= row["us"] <= row["p90"]
    assert row["share_of_ceiling"] > 0
    assert row["mode"] == "cpu"


def test_bench_gives_no_time_to_wrong_results(
    current: KernelRegistry, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = _plugin("extra")

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        rules = {"dtype": OneOf(torch.float32), "hidden_size": OneOf(1024), "out_format": OneOf("same")}
        wrong = lambda x, weight, eps, bias, scale, out: out.zero_()  # noqa: E731
        registry.add(KernelEntry("rmsnorm", "wrong", "extra", rules, lambda: wrong, ("cpu",)))

    plugin.fi_register_kernels = fi_register_kernels
    _add(current, plugin, "extra")
    assert main(["bench", "--op", "rmsnorm", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "out: first bad at (0, 0)" in out
    assert "1 of 1 rows have an error" in err
    rows = list(bench(["silu_mul"], "cpu", backend="extra"))
    assert "unsupported" in (rows[0].error or "")
    assert rows[0].us is None


def test_bench_covers_every_operation() -> None:
    assert list(WORKLOADS) == [operation.name for operation in OPERATIONS]


def test_bench_table_aligns_rows() -> None:
    rows = [Row("a", "c", "k", 1.0, 0.5, 2.0, 0.25, "graph", None), Row("b", "c", "k", *[None] * 5, "wrong")]
    lines = table(rows).splitlines()
    assert "25.0%  graph" in lines[1]
    assert lines[2].endswith("wrong")
