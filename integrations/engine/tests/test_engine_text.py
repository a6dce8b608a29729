"""Text to tokens and back."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import transformers
from fi_core.errors import ArgumentError
from fi_engine.tokenizer import TextCodec, TextStream
from fi_engine.tokenizer_build import build_bpe
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def _codec(pre_tokenizer: str = "smollm", template: str | None = None) -> TextCodec:
    tokens = [*_ALPHABET, "<|end|>", "he", "12", "123", "Ġa"]
    types = [1] * len(_ALPHABET) + [3, 1, 1, 1, 1]
    merges = ["h e", "1 2", "12 3", "Ġ a"]
    tokenizer = build_bpe(Path("m.gguf"), tokens, merges, types, pre_tokenizer)
    return TextCodec(tokenizer, (), template, {"eos_token": "<|end|>"})


def _pieces(codec: TextCodec, text: str) -> list[str]:
    return list(codec.tokenizer.encode(text, add_special_tokens=False).tokens)


def test_pre_tokenisers_cut_digits_as_their_models_do() -> None:
    assert _pieces(_codec("smollm"), "he 1234") == ["he", "Ġ", "1", "2", "3", "4"]
    assert _pieces(_codec("qwen2"), "he 1234") == ["he", "Ġ", "1", "2", "3", "4"]
    assert _pieces(_codec("llama-bpe"), "he 1234") == ["he", "Ġ", "123", "4"]
    assert _pieces(_codec("gpt-2"), "he1234") == ["he", "123", "4"]


_HARD_TEXTS = (
    "He'LL say: “it's 12,345.67 €”!!\r\n\n  日本語 \t👩‍🚀 end  ",
    "x=1; y  =\t2;;\n\n\n    return (a+b)**2 // 7\r\n",
    "ßé ١٢٣٤ ²³ Ⅷ naïve—dash 'tis don't  \u00a0nbsp",
)


@pytest.mark.parametrize("text", _HARD_TEXTS)
def test_words_are_cut_as_transformers_cuts_them(text: str) -> None:
    alphabet = {token: token_id for token_id, token in enumerate(_ALPHABET)}
    qwen = transformers.Qwen2Tokenizer(vocab=alphabet, merges=[]).backend_tokenizer.pre_tokenizer
    assert _words("qwen2", text) == [word for word, _ in qwen.pre_tokenize_str(text)]
    # The pattern that transformers converts Llama 3's tokeniser with is this class's default.
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    llama = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert _words("llama-bpe", text) == [word for word, _ in llama.pre_tokenize_str(text)]


def _words(pre_tokenizer: str, text: str) -> list[str]:
    cut = _codec(pre_tokenizer).tokenizer.pre_tokenizer
    return [word for word, _ in cut.pre_tokenize_str(text)]


def test_special_tokens_are_matched_whole_and_left_out_of_text() -> None:
    codec = _codec()
    ids = codec.encode("a<|end|>é")
    assert len(ids) == 4 and codec.decode(ids) == "aé"


@pytest.mark.parametrize("pre_tokenizer", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_any_text_comes_back(pre_tokenizer: str) -> None:
    codec = _codec(pre_tokenizer)
    text = "He said: “it's 12,345 €”\r\n\n  日本語 \t👩‍🚀 end "
    assert codec.decode(codec.encode(text)) == text


def test_chat_template_runs_in_a_sandbox() -> None:
    codec = _codec(template="{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}a")
    ids = codec.encode_chat([{"role": "user", "content": "he"}])
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) == "user:he<|end|>a"
    for template in ("{{ messages.__class__.__mro__ }}", "{{ raise_exception('no system role') }}"):
        with pytest.raises(ArgumentError, match="messages"):
            _codec(template=template).encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(ArgumentError, match="chat_template: expected a Jinja template"):
        _codec(template="{% for m in messages %}")
    with pytest.raises(ArgumentError, match="chat template"):
        _codec().encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(ArgumentError, match="role and content"):
        codec.encode_chat([{"role": "user", "text": "x"}])
    for message, problem in (
        ("user", "mappings"),
        ({"role": "user", "content": None}, "content: expected a string"),
        ({"role": "user", "content": "\ud800"}, "surrogates"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            codec.encode_chat([message])
    with pytest.raises(ArgumentError, match="prompt: expected text without lone surrogates"):
        codec.encode("a\udfffb")


def _pushed(text: str, cut: int = 0) -> tuple[list[str], TextStream]:
    """What each token of ``text`` (without the last ``cut`` tokens) completes."""
    codec = _codec()
    stream = TextStream(codec)
    ids = codec.encode(text)
    return [stream.push(token) for token in ids[: len(ids) - cut]], stream


def test_stream_never_gives_half_a_character() -> None:
    given, stream = _pushed("é日👩‍🚀 a")
    assert "".join(given) == "é日👩‍🚀 a" and stream.finish() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in given)


def test_stream_decodes_what_stays_incomplete_at_the_end() -> None:
    given, stream = _pushed("aé", cut=1)
    assert "".join(given) == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
