"""The catalogue: names, choice, what each case asks of a kernel, and the checks that stand before every timing."""

import pytest
import torch
from fi_benchmarks.attention_cases import decode_lengths
from fi_benchmarks.attention_inputs import Shape, attention_problem, checked_rows, make_inputs, visible_pages
from fi_benchmarks.catalogue import GROUPS, all_cases, choose
from fi_benchmarks.memory_cases import memory_cases
from fi_benchmarks.numerics import compare
from fi_benchmarks.sampling_cases import TASKS, _top_k
from fi_benchmarks.speculation_cases import TASKS as SPECULATION_TASKS
from fi_core.contract import EXACT, Tolerance, target_of
from fi_core.registry import registry, use

CPU = torch.device("cpu")


def test_names_are_unique_and_every_group_and_operation_is_there():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.group for case in cases} == set(GROUPS)
    wanted = "rope append_kv rmsnorm add_rmsnorm silu_mul gelu_mul merge_states copy_pages attention sample filter_logits top_k"
    wanted += " logprobs verify_chain verify_tree"
    assert {case.op for case in cases} == set(wanted.split())
    assert {case.op for case in cases} <= set(registry().operations)


@pytest.mark.parametrize(
    "name",
    [
        "rope T8192",
        "append T64",
        "append T8192 fp8 rope q k",
        "add_rmsnorm T64 fp8",
        "decode B1 1k h8/1 d128 page16",
        "decode B64 zipf 64k h32/8 d128 page16",
        "decode B64 2k h32/8 d128 page16 fp8",
        "prefill B1 S16384 h32/8 d128 causal=1",
        "prefill B32 S512 h32/8 d128 causal=1 page1",
        "append B16 q128 kv4096 h32/8 d128 page16",
        "mixed chunked 512+255 decode 4k",
        "sampling B512 V32000 topk50 topp.9 joint",
    ],
)
def test_cases_that_others_are_compared_by(name):
    assert [case.name for case in choose([], [name])] == [name]


def test_choice_by_operation_group_and_part_of_a_name():
    assert {case.op for case in choose(["rope", "copy_pages"], [])} == {"rope", "copy_pages"}
    assert {case.group for case in choose(["decode"], [])} == {"decode"}
    both = choose(["decode"], ["B1 32k", "zipf"])
    assert both and all("B1 32k" in case.name or "zipf" in case.name for case in both)
    with pytest.raises(ValueError, match="unknown operation or group nothing"):
        choose(["nothing"], [])
    with pytest.raises(ValueError, match="no case matches 'B3 5k'"):
        choose([], ["B3 5k"])


def test_the_peers_batches_of_random_lengths():
    lengths = decode_lengths()
    assert (len(lengths["B64 zipf 64k"]), max(lengths["B64 zipf 64k"]), min(lengths["B64 zipf 64k"])) == (
        64,
        65536,
        1024,
    )
    assert all(128 <= length < 2048 for length in lengths["B128 uniform 128-2k"])
    assert len(lengths["B16 uniform 512-16k"]) == 16


@pytest.mark.parametrize("case", [case for case in memory_cases() if "T64" in case.name], ids=lambda case: case.name)
def test_our_calls_agree_with_the_check_and_a_wrong_output_does_not(case):
    problem = case.build(CPU)
    assert registry().operations[case.op].request(target_of(CPU), **problem.request)
    with use(backend="reference"):
        outputs = dict(problem.ours[""]()())
    found = problem.check(outputs)
    assert found.message is None, found
    for name, tensor in outputs.items():
        spoiled = tensor.clone()
        spoiled.view(torch.uint8).flatten()[-64:] = 0x55
        assert problem.check({**outputs, name: spoiled}).message is not None, name


def small(**changes):
    return Shape(num_qo_heads=4, num_kv_heads=2, head_dim=64, **changes)


SHAPES = {
    "paged": small(),
    "page1": small(page_size=1),
    "ragged": small(page_size=None),
    "full": small(page_size=None, causal=False),
    "window": small(window=5),
    "features": small(soft_cap=30.0, sinks=True),
    "fp8": small(kv_format="fp8_e4m3"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_checked_row_by_row(name):
    paged = SHAPES[name].page_size is not None
    problem = attention_problem(CPU, SHAPES[name], [3, 1, 20], [40, 17, 20], variants=True, beside_ragged=paged)
    assert set(problem.ours) == {"", "+update", "+mixed-plan", *(["+ragged"] if paged else [])}
    with use(backend="reference"):
        for make in problem.ours.values():
            out = make()()["out"]
            assert problem.check({"out": out}).message is None
    out[-1, 0, 0] += 5.0
    assert problem.check({"out": out}).message is not None


def test_checked_rows_hold_the_first_and_last_of_each_request():
    rows = checked_rows([5, 0, 1, 4000], limit=32)
    assert {(0, 0), (0, 4), (2, 0), (3, 0), (3, 3999)} <= set(rows)
    assert len(rows) <= 32 and rows == sorted(set(rows))
    assert sum(request == 3 for request, _ in rows) > 20
    assert all(0 <= token < [5, 0, 1, 4000][request] for request, token in rows)
    many = checked_rows([1] * 1000, limit=64)
    assert len(many) <= 64 and many[-1][0] > 900


@pytest.mark.parametrize(("window", "first"), [(None, (0, 0)), (20, (1, 0))])
def test_the_floor_reads_the_visible_pages_and_no_byte_past_a_request(window, first):
    inputs = make_inputs(CPU, small(window=window), [1, 1], [40, 16])
    pages, valid = visible_pages(inputs)
    token_bytes = 2 * 64 * 2
    table = inputs.batch.table
    expected = [*table[0, first[0] : 3].tolist(), *table[1, first[1] : 1].tolist()]
    assert pages.tolist() == expected
    assert valid.tolist() == [count * token_bytes for count in ([16, 16, 8] if window is None else [16, 8]) + [16]]


@pytest.mark.parametrize("task", TASKS)
def test_sampling_is_checked_against_the_reference(task):
    (case,) = choose([], [f"sampling B16 V32000 {task}"])
    problem = case.build(CPU)
    with use(backend="reference"):
        outputs = dict(problem.ours[""]()())
    assert problem.check(outputs).message is None
    name, tensor = next(iter(outputs.items()))
    assert problem.check({**outputs, name: torch.full_like(tensor, 7)}).message is not None


@pytest.mark.parametrize("task", SPECULATION_TASKS)
def test_verification_is_checked_against_the_reference(task):
    _, build = SPECULATION_TASKS[task]
    problem = build(CPU, num_rows=3, vocab_size=1000)
    with use(backend="reference"):
        outputs = dict(problem.ours[""]()())
    assert problem.check(outputs).message is None
    for name, tensor in outputs.items():
        assert problem.check({**outputs, name: tensor + 1}).message is not None
    if "chain" in task:
        assert problem.check({"drawn": outputs["tokens"]}).message is None
        assert problem.check({"drawn": outputs["tokens"] + 1000}).message is not None


def test_chains_of_other_generators_must_be_chains_of_the_drafted_tokens():
    problem = SPECULATION_TASKS["chain4 drafted"][1](CPU, num_rows=24, vocab_size=100)
    with use(backend="reference"):
        outputs = dict(problem.ours[""]()())
    tokens, accepted = outputs["tokens"], outputs["num_accepted"]
    (row, *_) = (accepted == 2).nonzero().flatten().tolist()
    assert problem.check({"drawn": tokens}).message is None
    for step, token in ((0, -1), (1, int(tokens[row, 1] + 1) % 100), (2, -1), (3, 0), (4, 0), (2, 100)):
        spoiled = tokens.clone()
        spoiled[row, step] = token
        assert (problem.check({"drawn": spoiled}).message is None) == (step == 2 and token == -1), step


def test_many_of_a_long_row_are_checked_against_a_sort():
    problem = _top_k(CPU, "select", 2, 3000, k=2048)
    with use(backend="reference"):
        outputs = dict(problem.ours[""]()())
    assert problem.check(outputs).message is None
    assert problem.check({"indices": outputs["indices"].flip(1)}).message is not None


def test_draws_of_other_generators_must_be_of_what_the_filters_keep():
    (case,) = choose([], ["sampling B16 V32000 topk50"])
    problem = case.build(CPU)
    logits = problem.inputs.logits
    assert problem.check({"drawn": logits.argmax(dim=1)}).message is None
    assert problem.check({"tokens": logits.argmax(dim=1)}).message is not None
    assert problem.check({"drawn": logits.argmin(dim=1)}).message is not None
    assert problem.check({"drawn": logits.argmax(dim=1) + 40000}).message is not None


def test_comparison_fails_on_nan_shape_and_single_bits():
    expected = torch.linspace(-1, 1, 100, dtype=torch.float64)
    loose = Tolerance(1e-2, 1e-2)
    assert compare(expected.float(), expected, loose).message is None
    spoiled = expected.float()
    spoiled[3] = float("nan")
    assert compare(spoiled, expected, loose).message is not None
    assert "shape" in compare(expected[:5], expected, loose).message
    exact = expected.float()
    assert compare(exact, expected, EXACT).message is None
    exact[7] = torch.nextafter(exact[7], torch.tensor(9.0))
    assert compare(exact, expected, EXACT).message == "1 of 100 elements are not exact"
