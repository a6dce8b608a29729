"""What the sampler draws, against SGLang's own torch sampler of the same filters."""

from types import SimpleNamespace

import pytest
import torch
from fi_sglang.sampler import FiSampler, filters_of
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

VOCAB = 60


@pytest.fixture
def sampler(monkeypatch):
    """A sampler without the process groups that SGLang's constructor asks for."""
    made = FiSampler.__new__(FiSampler)
    torch.nn.Module.__init__(made)
    made.rl_on_policy_target = None
    monkeypatch.setattr(made, "_preprocess_logits", lambda logits, info: logits)
    monkeypatch.setattr(made, "_sync_token_ids_across_tp", lambda tokens, info: None)
    return made


def info_of(num, temperature=0.7, top_k=12, top_p=0.8, min_p=0.05, seed=None):
    return SimpleNamespace(
        is_all_greedy=False,
        temperatures=torch.full((num, 1), temperature),
        top_ks=torch.full((num,), top_k, dtype=torch.int32),
        top_ps=torch.full((num,), top_p),
        min_ps=torch.full((num,), min_p),
        need_top_k_sampling=True,
        need_top_p_sampling=True,
        need_min_p_sampling=True,
        sampling_seed=seed,
    )


def draw(sampler, logits, info, positions=None):
    output = SimpleNamespace(next_token_logits=logits.clone())
    positions = torch.zeros(logits.shape[0], dtype=torch.int64) if positions is None else positions
    return sampler.forward(output, info, False, [], [], positions)


@pytest.mark.parametrize("fused", [True, False])
def test_draws_follow_sglangs_own(sampler, fused):
    torch.manual_seed(0)
    num = 6000
    logits = (torch.randn(1, VOCAB) * 2).expand(num, VOCAB)
    info = info_of(num)
    probs = (logits / info.temperatures).softmax(dim=-1)
    if fused:
        tokens = draw(sampler, logits, info)
    else:
        tokens = sampler._sample_from_probs(probs, info, None, False)
    theirs = top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(), info.top_ks, info.top_ps, info.min_ps, True, None, None
    )
    found, expected = (torch.bincount(each, minlength=VOCAB) / num for each in (tokens, theirs))
    assert tokens.dtype == torch.int32 and set(tokens.tolist()) == set(theirs.tolist())
    assert (found - expected).abs().max() < 6 * (0.5 / num) ** 0.5


def test_seeds_and_positions(sampler):
    logits = torch.zeros(3, VOCAB)
    info = info_of(3, top_k=VOCAB, top_p=1.0, min_p=0.0, seed=torch.tensor([5, 5, 6]))
    positions = torch.tensor([1, 1, 1])
    first = draw(sampler, logits, info, positions)
    assert first.equal(draw(sampler, logits, info, positions)) and first[0] == first[1]
    others = [int(draw(sampler, logits, info, positions + step)[0]) for step in range(6)]
    assert len(set(others)) > 1


def test_only_filters_in_use_are_asked_for():
    info = info_of(2)
    info.need_top_p_sampling = info.need_min_p_sampling = False
    assert filters_of(info, None).active == {"top_k"} and filters_of(info, None).order == "joint"
