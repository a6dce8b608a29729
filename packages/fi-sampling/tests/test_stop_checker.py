"""StopChecker: held-back text, stop strings across tokens, stop tokens, lengths."""

import random

from fi_sampling import SamplingParams, StopChecker


def run(params, pieces, eos=()):
    """Texts shown and the last event, for (token, text) pieces."""
    checker, shown = StopChecker(params, eos), []
    for token, text in pieces:
        event = checker.push(token, text)
        shown.append(event.text)
        if event.reason is not None:
            return shown, event
    return shown, event


def test_a_stop_string_across_tokens_is_never_shown():
    shown, event = run(SamplingParams(stop="<end>"), [(1, "a<e"), (2, "nd"), (3, ">b")])
    assert shown == ["a", "", ""] and (event.reason, event.matched) == ("stop", "<end>")


def test_held_back_text_is_released_when_it_cannot_match():
    shown, event = run(SamplingParams(stop=("<end>",)), [(1, "a<e"), (2, "nx"), (3, "<<")])
    assert shown == ["a", "<enx", "<"] and event.reason is None


def test_the_first_stop_string_wins_and_then_the_longest():
    assert run(SamplingParams(stop=("b", "ab")), [(1, "xab")])[1].matched == "ab"
    assert run(SamplingParams(stop=("c", "b")), [(1, "abc")])[0] == ["a"]
    assert run(SamplingParams(stop=("ab", "abc")), [(1, "abcd")])[1].matched == "abc"


def test_stop_tokens_and_end_tokens():
    params = SamplingParams(stop="zz", stop_token_ids=(9,))
    shown, event = run(params, [(1, "az"), (9, "!")])
    assert shown == ["a", "z"] and (event.reason, event.matched) == ("stop", 9)
    assert run(params, [(2, "a")], eos={2})[1].matched == 2
    assert run(SamplingParams(ignore_eos=True), [(2, "a")], eos={2})[1].reason is None


def test_max_tokens_ends_with_the_held_text():
    shown, event = run(SamplingParams(stop="zz", max_tokens=2), [(1, "a"), (2, "bz"), (3, "c")])
    assert shown == ["a", "bz"] and event.reason == "length"
    assert run(SamplingParams(max_tokens=None), [(1, "a")] * 40)[1].reason is None


def test_min_tokens_delays_every_stop():
    params = SamplingParams(stop="b", stop_token_ids=(7,), min_tokens=2)
    shown, event = run(params, [(7, "a"), (1, "b"), (1, "cb")])
    assert shown == ["a", "b", "c"] and event.matched == "b"


def test_flush_gives_up_held_text():
    checker = StopChecker(SamplingParams(stop="xyz"))
    assert checker.push(1, "axy").text == "a"
    assert checker.flush() == "xy" and checker.flush() == ""


def test_any_split_of_a_text_shows_the_same():
    draw = random.Random(2)
    for _ in range(300):
        stops = tuple("".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3)))
        text = "".join(draw.choices("ab", k=12))
        found = [text.find(stop) for stop in stops if stop in text]
        pieces, rest = [], text
        while rest:
            cut = draw.randint(1, 4)
            pieces.append((1, rest[:cut]))
            rest = rest[cut:]
        shown, event = run(SamplingParams(stop=stops, max_tokens=len(pieces)), pieces)
        if event.reason == "length":
            assert not found and "".join(shown) == text
        else:
            assert found and text.startswith("".join(shown)) and event.matched in text
            assert not any(stop in "".join(shown) for stop in stops)
