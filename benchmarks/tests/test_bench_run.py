"""A run from the command line on the CPU, rows of implementations that fail, and reports made from files alone."""

import json

import pytest
import torch
from fi_benchmarks import runner
from fi_benchmarks.catalogue import choose
from fi_benchmarks.ceilings import Bench, Rates
from fi_benchmarks.cli import main, parser
from fi_benchmarks.peers import Peer, PeerOptions, peers
from fi_benchmarks.plots import PlotError, draw_all
from fi_benchmarks.problem import Case, Problem
from fi_benchmarks.report import by_group, markdown
from fi_benchmarks.results import circumstances, load, load_file
from fi_benchmarks.runner import Choice, run_case
from fi_benchmarks.tunings import GivenTuning, with_tunings
from fi_core.bench.timing import CpuClock
from fi_core.contract import Cost, Target
from fi_core.registry import registry

CPU = torch.device("cpu")
BENCH, RATES = Bench(CPU, CpuClock(), rounds=3), Rates(1e10, 1e10, 1e11)


def rows_of(case_name, *found, wanted=None):
    (case,) = choose([], [case_name])
    rows = run_case(case, BENCH, RATES, Choice(["reference"], found, wanted))
    return {row.impl: row for row in rows}


def peer(make):
    return Peer("other", lambda options: "1", {"rmsnorm": lambda problem: {"other": make(problem)}})


def reference_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), eps).to(x.dtype)


def right(problem):
    inputs = problem.inputs
    return lambda: lambda: {"out": reference_norm(inputs.x, inputs.weight, inputs.eps)}


def wrong(problem):
    inputs = problem.inputs
    return lambda: lambda: {"out": reference_norm(inputs.x, inputs.weight, inputs.eps) * 1.1}


def raising(problem):
    def make():
        raise KeyError("no such module")

    return make


def test_rows_of_a_case_name_shares_ratios_and_the_noise():
    rows = rows_of("rmsnorm T64", peer(right))
    assert list(rows) == ["reference.rmsnorm", "other", "copy-torch", "reference.rmsnorm (again)"]
    ours, other, copy = rows["reference.rmsnorm"], rows["other"], rows["copy-torch"]
    assert (ours.kind, other.kind, copy.kind, rows["reference.rmsnorm (again)"].kind) == (
        "ours",
        "peer",
        "ceiling",
        "again",
    )
    assert ours.checked and other.checked and not copy.checked
    assert ours.ratio_to_best_peer == pytest.approx(other.us / ours.us)
    assert ours.share_of_ceiling == pytest.approx(max(copy.us, ours.num_flops / RATES.matmul * 1e6) / ours.us)
    assert other.rel_rmse < 4e-3 and other.p10 <= other.us <= other.p90


@pytest.mark.parametrize(("make", "text"), [(wrong, "rel_rmse"), (raising, "KeyError: 'no such module'")])
def test_what_is_wrong_or_raises_is_a_row_with_an_error_and_no_time(make, text):
    rows = rows_of("rmsnorm T64", peer(make))
    assert text in rows["other"].error
    assert rows["other"].us is None and not rows["other"].checked
    assert rows["reference.rmsnorm"].us > 0.0 and rows["reference.rmsnorm"].ratio_to_best_peer is None


def test_a_call_that_fails_only_while_it_is_timed_costs_its_own_row_alone():
    def late(problem):
        calls = iter([reference_norm(problem.inputs.x, problem.inputs.weight, problem.inputs.eps)])
        return lambda: lambda: {"out": next(calls)}

    rows = rows_of("rmsnorm T64", peer(late))
    assert rows["other"].error.startswith("StopIteration") and rows["other"].us is None
    assert rows["reference.rmsnorm"].us > 0.0


def test_inputs_that_cannot_be_made_are_a_row(monkeypatch):
    (case,) = choose([], ["rmsnorm T64"])
    broken = type(case)(case.op, case.group, case.name, lambda device: 1 / 0)
    (row,) = run_case(broken, BENCH, RATES, Choice(["reference"], []))
    assert row.error.startswith("ZeroDivisionError") and row.impl == "inputs"


def test_implementations_are_chosen_by_the_begin_of_their_names():
    assert list(rows_of("rmsnorm T64", peer(right), wanted=["oth"])) == ["other", "other (again)"]


def test_options_are_parsed_and_unknown_ones_refused(capsys):
    options = parser().parse_args(["--op", "rope", "--case", "a", "--case", "b", "--quick", "--seconds", "90"])
    assert (options.op, options.case, options.quick, options.seconds) == (["rope"], ["a", "b"], True, 90.0)
    for arguments in (["--nothing"], ["--op", "nothing"], ["--case", "nothing at all"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "nothing at all" in capsys.readouterr().err


def test_the_list_names_cases_and_peers(capsys):
    assert main(["--list", "--op", "rope"]) == 0
    text = capsys.readouterr().out
    assert "rope T8192" in text and "decode" not in text
    assert f"peer torch: {torch.__version__}" in text
    assert "peer fa3: absent (ImportError: _vllm_fa3_C.abi3.so is not in a folder that --peers names)" in text


def test_peers_that_are_not_there_say_so(tmp_path):
    by_name = {item.name: item for item in peers()}
    assert set(by_name) == {"torch", "cudnn", "fa3", "flashinfer"}
    with pytest.raises(ImportError, match=str(tmp_path)):
        by_name["fa3"].find(PeerOptions(tmp_path))
    with pytest.raises(ImportError):
        by_name["flashinfer"].find(PeerOptions())


def test_a_run_writes_rows_and_a_second_one_replaces_its_cases_alone(tmp_path, capsys):
    common = ["--device", "cpu", "--quick", "--reference", "--out", str(tmp_path)]
    assert main([*common, "--case", "rmsnorm T64", "--case", "rope T64"]) == 0
    assert "not run" not in capsys.readouterr().out
    first = load_file(tmp_path / "memory.json")
    assert {"op", "case", "impl", "us", "p10", "p90", "warm_us", "share_of_ceiling", "checked"} <= set(first[0])
    assert {"device", "versions", "commit"} <= set(first[0])
    assert {row["case"] for row in load_file(tmp_path / "ceilings.json")} >= {"ceiling mm 512", "ceiling launch"}
    assert main([*common, "--op", "rope", "--case", "rope T64", "--impl", "reference", "--seconds", "100"]) == 0
    second = load_file(tmp_path / "memory.json")
    assert [row for row in second if row["op"] == "rmsnorm"] == [row for row in first if row["op"] == "rmsnorm"]
    assert all(row["impl"].startswith("reference") for row in second if row["op"] == "rope")
    assert "reference.rope" in (tmp_path / "report.md").read_text()


def test_rows_name_the_commit_that_was_given_or_git_knows(monkeypatch):
    assert circumstances(CPU, {"fa3": "x"}, "abc")["commit"] == "abc"
    assert "fa3=x" in circumstances(CPU, {"fa3": "x"})["versions"]
    monkeypatch.setenv("PATH", "")
    assert circumstances(CPU, {})["commit"] == "unknown"


def test_cases_left_out_for_time_are_named(tmp_path, capsys):
    assert main(["--device", "cpu", "--quick", "--case", "rope T64", "--seconds", "0", "--out", str(tmp_path)]) == 1
    assert "not run, the time was over: rope T64" in capsys.readouterr().out


def synthetic():
    """Rows as a GPU run writes them."""
    shared = {"device": "GPU", "versions": "torch=2", "commit": "c0ffee"}
    rows = []
    for case, group, flops in (
        ("decode B1", "decode", 4_000_000),
        ("append T64", "memory", 0),
        ("prefill B4", "prefill", 10**12),
    ):
        base = {"op": "attention", "group": group, "case": case, "num_bytes": 10**6, "num_flops": flops, **shared}
        for impl, kind, us in (
            ("cuda.decode", "ours", 12.0),
            ("cuda.decode+update", "ours", 11.0),
            ("fa3", "peer", 15.0),
            ("flashinfer", "peer", 14.0),
            ("floor-pages", "ceiling", 9.0),
            ("cuda.decode (again)", "again", 12.12),
        ):
            times = {"us": us, "p10": us - 1, "p90": us + 1, "warm_us": us / 2, "share_of_ceiling": 9.0 / us}
            rows.append({**base, "impl": impl, "kind": kind, **times})
        rows.append({**base, "impl": "cudnn", "kind": "peer", "error": "RuntimeError: no kernel"})
    for case, num_bytes, flops in (("read 2GiB", 2**31, 0), ("mm 8192", 10**8, 10**12), ("launch", 8, 1)):
        times = {"us": 1000.0, "p10": 990.0, "p90": 1010.0, "warm_us": 900.0, "share_of_ceiling": 1.0}
        base = {"op": "ceiling", "group": "ceilings", "case": f"ceiling {case}", "impl": "x", "kind": "ceiling"}
        rows.append({**base, **times, "num_bytes": num_bytes, "num_flops": flops, **shared})
    return rows


def test_tables_show_the_best_of_ours_beside_the_best_peer():
    text = markdown(synthetic())
    line = next(line for line in text.splitlines() if line.startswith("| decode B1"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:10] == [
        "decode B1", "cuda.decode", "12.0", "11.0 to 13.0", "6.00", "75%", "flashinfer", "14.0", "1.17", "9.00 (floor-pages)",
    ]  # fmt: skip
    assert cells[10] == "cuda.decode+update 11.0, fa3 15.0"
    assert "differs by 1.0% (median), 1.0% at most" in text
    assert "- decode B1, cudnn: RuntimeError: no kernel" in text
    assert "| ceiling mm 8192 | x | 1000 | 900 | 1000 TFLOP/s |" in text
    assert "| ceiling read 2GiB | x | 1000 | 900 | 2147 GB/s |" in text
    assert "GPU; commit c0ffee; torch=2" in text


def test_a_case_without_ours_or_peers_still_has_a_line():
    rows = [row for row in synthetic() if row["kind"] == "ceiling"]
    line = next(line for line in markdown(rows).splitlines() if line.startswith("| decode B1"))
    assert line.startswith("| decode B1 | none |")


def test_report_from_files_makes_tables_and_pictures(tmp_path, capsys):
    (tmp_path / "decode.json").write_text(json.dumps(synthetic()))
    (tmp_path / "other.json").write_text('{"not": "rows"}')
    assert main(["report", str(tmp_path)]) == 0
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"decode-1.png", "memory-1.png", "prefill-1.png", "ceilings-1.png", "roofline.png"}
    assert all(data.startswith(b"\x89PNG") and 5_000 < len(data) < 200_000 for data in pictures.values())
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_pictures_without_matplotlib_fail_by_name_and_tables_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (tmp_path / "decode.json").write_text(json.dumps(synthetic()))
    assert main(["report", str(tmp_path / "decode.json")]) == 1
    assert "matplotlib, which is not installed" in capsys.readouterr().err
    assert (tmp_path / "report.md").exists()
    with pytest.raises(PlotError, match="pip install matplotlib"):
        draw_all(synthetic(), tmp_path)


def test_files_that_are_no_rows_are_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"op": "rope"}]')
    with pytest.raises(ValueError, match=r"x\.json: not a list of benchmark rows"):
        load_file(path)
    assert load([tmp_path]) == []
    assert main(["report", str(tmp_path)]) == 1


def test_groups_and_cases_keep_the_order_of_their_rows():
    groups = by_group(synthetic())
    assert list(groups) == ["decode", "memory", "prefill", "ceilings"]
    assert [case.name for case in groups["ceilings"]] == ["ceiling read 2GiB", "ceiling mm 8192", "ceiling launch"]


def test_our_backends_leave_the_reference_out():
    assert "reference" not in runner.our_backends(False)
    assert "reference" in runner.our_backends(True)


def test_tunings_are_in_effect_while_their_variants_are_made():
    asked = []

    def make():
        manager = registry().manager
        asked.append([manager.hook.fi_tuning(op=op, target=Target("cpu")) for op in ("attention_decode", "other")])
        return lambda: {}

    problem = Problem({}, None, {"": make, "+update": make}, lambda outputs: None, Cost(1, 1))
    given = [GivenTuning.parse(f"attention_decode:{text}") for text in ("num_stages=2,flag=True", "rows=8")]
    tuned = with_tunings(Case("attention", "decode", "a case", lambda device: problem), given).build(CPU)
    names = ["num_stages=2,flag=True", "rows=8"]
    assert list(tuned.ours) == ["", "+update", *(f"{form}+{name}" for form in ("", "+update") for name in names)]
    for maker in tuned.ours.values():
        maker()
    answers = [{"num_stages": 2, "flag": True}, {"rows": 8}]
    assert asked == [[None, None]] * 2 + [[answer, None] for answer in answers] * 2


@pytest.mark.parametrize(
    "text", ["attention_decode", "attention_decode:rows", "rows=8", "a:rows=", "a:rows=x", "a:1=2"]
)
def test_a_tuning_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="NAME=VALUE" if "x" not in text else "value of rows"):
        GivenTuning.parse(text)
