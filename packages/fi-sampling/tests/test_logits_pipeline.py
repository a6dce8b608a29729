"""Pipelines: kinds, fusion that changes nothing, user operations and plugins."""

import fi_core as fi
import pytest
import torch
from fi_core import registry as registry_module
from fi_sampling import (
    BUILTIN_OPS,
    BUILTIN_RULES,
    DEFAULT_OPS,
    FusionRule,
    Kind,
    LogitsOp,
    Pipeline,
    PipelineTypeError,
    ProcessorError,
    Step,
    fusion_rules,
    logits_op,
    logits_ops,
    pipeline_of,
)

NUM_ROWS, VOCAB_SIZE = 24, 70


def noise(seed=0):
    return torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def cycled(values, dtype=torch.float32):
    return torch.tensor([values[row % len(values)] for row in range(NUM_ROWS)], dtype=dtype)


def make_step(order="sequential", with_penalties=True):
    counts = torch.randint(0, 3, (2, NUM_ROWS, VOCAB_SIZE), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    penalties = fi.PenaltyParams(
        allowed=torch.full((NUM_ROWS, 3), 0x5AF3FF7F, dtype=torch.int32),
        bias_indptr=torch.arange(NUM_ROWS + 1, dtype=torch.int32),
        bias_tokens=torch.arange(NUM_ROWS, dtype=torch.int32),
        bias_values=torch.full((NUM_ROWS,), 3.0),
        repetition=cycled([1.0, 1.3]),
        frequency=cycled([0.0, 0.4, 0.1]),
        presence=cycled([0.5, 0.0]),
        prompt_counts=counts[0],
        output_counts=counts[1],
        rows=torch.arange(NUM_ROWS, dtype=torch.int32),
    )
    filters = fi.FilterParams(
        temperature=cycled([0.0, 0.7, 1.0, 1.5]),
        top_k=cycled([0, 20, 7], torch.int32),
        top_p=cycled([1.0, 0.8, 0.9, 0.6, 0.95]),
        min_p=cycled([0.0, 0.02]),
        typical_p=cycled([1.0, 0.9, 1.0]),
        order=order,
    )
    keys = fi.DrawKeys(torch.arange(NUM_ROWS) + 5, torch.zeros(NUM_ROWS, dtype=torch.int32), torch.arange(NUM_ROWS))
    return Step(filters, penalties if with_penalties else fi.PenaltyParams(), keys)


def test_default_pipeline_fuses_to_one_operation():
    pipeline = pipeline_of(DEFAULT_OPS)
    assert [op.name for op in pipeline.stages] == ["sample"]
    text = pipeline.explain()
    assert "rule whole_draw fused allowed + bias + repetition + frequency + presence + temperature + top_k" in text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "names",
    [
        tuple(op.name for op in DEFAULT_OPS),
        ("repetition", "allowed", "presence", "temperature", "top_p", "draw"),
        ("top_p", "top_k", "temperature", "draw"),
        ("bias", "top_k", "min_p", "softmax"),
        ("temperature", "top_k", "frequency", "top_p", "typical_p", "softmax", "draw_probs"),
        ("temperature", "min_p"),
    ],
    ids=" ".join,
)
def test_fusion_changes_no_bit(names, seed):
    ops = [BUILTIN_OPS[name] for name in names]
    fused, plain = Pipeline(ops, BUILTIN_RULES), Pipeline(ops)
    assert len(fused.stages) < len(plain.stages) == len(ops)
    logits = noise(seed)
    assert torch.equal(fused(logits.clone(), make_step()), plain(logits.clone(), make_step()))


@pytest.fixture
def fresh_registry():
    registry_module.reset_registry()
    yield registry_module.registry()
    registry_module.reset_registry()


def sparse_step():
    """A step whose parameters lie in columns, of which slots pick."""
    step, slots = make_step(), torch.randperm(NUM_ROWS + 4, generator=torch.Generator().manual_seed(4))[:NUM_ROWS]
    slots[5::9] = -1

    def spread(column):
        held = column.new_full((NUM_ROWS + 4, *column.shape[1:]), 3)
        held[slots[slots >= 0]] = column[slots >= 0]
        return held

    filters = {name: spread(getattr(step.filters, name)) for name in ("temperature", "top_k", "top_p", "min_p")}
    history = fi.TokenHistory.empty(NUM_ROWS + 4, VOCAB_SIZE, 20)
    said = torch.randint(0, VOCAB_SIZE, (NUM_ROWS + 4, 30), generator=torch.Generator().manual_seed(5)) // 4
    fi.record_tokens(history, said)
    penalties = fi.PenaltyParams(
        allowed=spread(step.penalties.allowed),
        bias_indptr=torch.arange(NUM_ROWS + 5, dtype=torch.int32),
        bias_tokens=torch.arange(NUM_ROWS + 4, dtype=torch.int32),
        bias_values=torch.full((NUM_ROWS + 4,), 3.0),
        repetition=spread(step.penalties.repetition),
        frequency=spread(step.penalties.frequency),
        history=history,
    )
    keys = fi.DrawKeys(spread(step.keys.seed), spread(step.keys.sample), step.keys.position)
    return Step(fi.FilterParams(**filters), penalties, keys, slots)


def counted(monkeypatch):
    """Names of the operations that are called from here on."""
    calls = []
    for name in ("penalize_logits", "sample", "filter_logits", "verify_chain"):
        real = getattr(fi, name)
        monkeypatch.setattr(fi, name, lambda *a, _real=real, _name=name, **k: (calls.append(_name), _real(*a, **k))[1])
    return calls


class Plain:
    """A back end whose kernels draw without penalties, and with ``slots`` or not; a kernel of its own that serves
    everything is declared but not preferred."""

    def __init__(self, slots):
        self.slots = slots

    @fi.hookimpl
    def fi_backend(self):
        return fi.BackendInfo("plain", "1", "a test's", priority=70)

    @fi.hookimpl
    def fi_register_kernels(self, registry):
        for name, penalties, slots, priority in (("sample", False, self.slots, 0), ("whole", True, True, -50)):
            for entry in registry.kernels("sample"):
                if entry.backend == "reference":
                    rules = dict(entry.rules)
                    rules["penalties"] = entry.rules["penalties"] if penalties else fi.SubsetOf()
                    rules["slots"] = fi.OneOf(False, True) if slots else fi.OneOf(False)
                    made = fi.KernelEntry("sample", name, "plain", rules, entry.load, ("cpu",), priority=priority)
                    registry.add(made)


@pytest.mark.parametrize("slots", [True, False])
def test_what_no_preferred_kernel_fuses_is_launched_before(fresh_registry, monkeypatch, slots):
    pipeline, step = pipeline_of(DEFAULT_OPS), sparse_step()
    calls = counted(monkeypatch)
    expected = pipeline(noise(), step)
    assert calls == ["sample"]
    assert (expected == -1).tolist() == (step.slots < 0).tolist()
    [line] = pipeline.launches(noise(), step)
    assert line == "reference.sample (allowed, bias, frequency, repetition, temperature, min_p, top_k, top_p, draw)"
    fresh_registry.register_plugin(Plain(slots), "plain")
    calls.clear()
    assert torch.equal(pipeline(noise(), step), expected)
    assert calls == ["penalize_logits", "sample"]
    lines = pipeline.launches(noise(), step)
    assert lines[0].startswith(
        "reference.penalize_logits (allowed, bias, frequency, repetition) (not fused: plain.sample is"
    )
    assert lines[-1] == "plain.sample (temperature, min_p, top_k, top_p, draw)"
    assert [line for line in lines if line.startswith("gather")] == lines[1:-1] and len(lines) == (2 if slots else 3)


def test_a_user_operation_between_penalties_and_filters_is_named(monkeypatch):
    double = logits_op("double")(lambda logits, step: logits * 2)
    pipeline = pipeline_of([*DEFAULT_OPS[:5], double, *DEFAULT_OPS[5:]])
    step = sparse_step()
    lines = pipeline.launches(noise(), step)
    assert [line.partition(" ")[0] for line in lines] == ["reference.penalize_logits", "double:", "reference.sample"]
    calls = counted(monkeypatch)
    expected = fi.penalize_logits(noise(), step.penalties, slots=step.slots) * 2
    expected = fi.sample(expected, step.rows_of(step.filters), step.row_keys).masked_fill(step.slots < 0, -1)
    calls.clear()
    assert torch.equal(pipeline(noise(), step), expected)
    assert calls == ["penalize_logits", "sample"]


def test_order_joint_needs_one_fused_operation():
    names = ("temperature", "top_k", "top_p", "draw")
    ops = [BUILTIN_OPS[name] for name in names]
    step = make_step("joint", with_penalties=False)
    filters = {name: getattr(step.filters, name) for name in names[:3]}
    step = Step(fi.FilterParams(**filters, order="joint"), step.penalties, step.keys)
    logits = noise()
    assert torch.equal(Pipeline(ops, BUILTIN_RULES)(logits, step), fi.sample(logits, step.filters, step.keys))
    with pytest.raises(fi.ArgumentError, match=r"^filters\.order:"):
        Pipeline(ops)(logits, step)


def test_type_errors_name_the_operations():
    with pytest.raises(PipelineTypeError, match="'top_k' takes logits, but operation 'softmax' gives probs"):
        pipeline_of(["softmax", "top_k", "draw"])
    with pytest.raises(PipelineTypeError, match="'draw_probs' takes probs, but the pipeline's input gives logits"):
        pipeline_of(["draw_probs"])
    with pytest.raises(PipelineTypeError, match="'temperature' takes logits, but operation 'draw' gives tokens"):
        pipeline_of(["draw", "temperature"])
    with pytest.raises(fi.ArgumentError, match=r"^ops:"):
        pipeline_of(["no_such_op"])
    with pytest.raises(fi.ArgumentError, match=r"^ops:"):
        pipeline_of([])


def test_a_rule_that_breaks_the_kinds_is_rejected():
    wrong = LogitsOp("wrong", Kind.PROBS, Kind.TOKENS, lambda tensor, step: tensor)
    rule = FusionRule("bad", lambda ops: 2 if len(ops) >= 2 else 0, lambda ops: wrong)
    with pytest.raises(PipelineTypeError, match="'wrong' takes probs"):
        Pipeline([BUILTIN_OPS["temperature"], BUILTIN_OPS["draw"]], [rule])


def test_user_operations_take_part():
    @logits_op("only_even")
    def only_even(logits, step):
        logits = logits.clone()
        logits[:, 1::2] = -torch.inf
        return logits

    pipeline = pipeline_of([*DEFAULT_OPS[:5], only_even, *DEFAULT_OPS[5:]])
    assert [op.name for op in pipeline.stages] == ["penalize_logits", "only_even", "sample"]
    step = make_step(with_penalties=False)
    tokens = pipeline(noise(), step)
    assert (tokens % 2 == 0).all()
    expected = noise()
    expected[:, 1::2] = -torch.inf
    assert torch.equal(tokens, fi.sample(expected, step.filters, step.keys))


def test_a_user_operation_may_give_probs_or_tokens():
    smooth = LogitsOp("smooth", Kind.PROBS, Kind.PROBS, lambda probs, step: 0.5 * probs + 0.5 / VOCAB_SIZE)
    first = LogitsOp("first", Kind.PROBS, Kind.TOKENS, lambda probs, step: probs.argmax(1))
    step = make_step(with_penalties=False)
    assert pipeline_of(["softmax", smooth, "draw_probs"])(noise(), step).shape == (NUM_ROWS,)
    assert torch.equal(pipeline_of(["softmax", first])(noise(), step), noise().argmax(1))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda logits, step: logits / step.nothing, "raised AttributeError"),
        (lambda logits, step: None, "returned NoneType, not a tensor"),
        (lambda logits, step: logits[:, :5], r"returned torch.float32 \(24, 5\)"),
        (lambda logits, step: logits.to(torch.int32), "returned torch.int32"),
    ],
)
def test_errors_of_a_user_operation_name_it(function, text):
    with pytest.raises(ProcessorError, match=f"'mine' {text}"):
        pipeline_of([logits_op("mine")(function), "draw"])(noise(), make_step())


class Plugin:
    """A third party's operation and rule."""

    halve = LogitsOp("halve", Kind.LOGITS, Kind.LOGITS, lambda logits, step: logits / 2)

    @fi.hookimpl(optionalhook=True)
    def fi_logits_ops(self):
        return [self.halve]

    @fi.hookimpl(optionalhook=True)
    def fi_fusion_rules(self):
        quarter = LogitsOp("quarter", Kind.LOGITS, Kind.LOGITS, lambda logits, step: logits / 4)
        return [FusionRule("halves", lambda ops: 2 * (list(ops[:2]) == [self.halve] * 2), lambda ops: quarter)]


def test_plugins_add_operations_and_rules(fresh_registry):
    fresh_registry.register_plugin(Plugin(), "third_party")
    assert "halve" in logits_ops() and fusion_rules()[0].name == "halves"
    pipeline = pipeline_of(["halve", "halve", "draw"])
    assert [op.name for op in pipeline.stages] == ["quarter", "draw"]
    fresh_registry.register_plugin(Plugin(), "twin")
    with pytest.raises(fi.PluginError, match="'halve' is already defined"):
        logits_ops()


def test_without_plugins_only_the_built_in_operations(fresh_registry):
    assert logits_ops() == BUILTIN_OPS and fusion_rules() == BUILTIN_RULES
