"""A ``tokenizers`` byte-level BPE tokeniser from the lists that a GGUF file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .errors import ModelFileError

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types that are matched whole in the text, before the BPE."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> Any:
    pattern = Regex(_WORDS + digits + _REST)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> Any | None:
    """How a pre-tokeniser of that GGUF name cuts text into words, or None for an unknown name."""
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name == "qwen2":
        return _split(r"\p{N}")
    if name == "llama-bpe":
        return _split(r"\p{N}{1,3}")
    return None


def build_bpe(
    path: Path, tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int], pre_tokenizer: str
) -> Tokenizer:
    """A tokeniser equal to the one the file was made from; ``path`` names the file in errors."""
    cut = _pre_tokenizer(pre_tokenizer)
    if cut is None:
        problem = f"{pre_tokenizer!r} is not one of gpt-2, default, smollm, qwen2, llama-bpe"
        raise ModelFileError(path, "field tokenizer.ggml.pre", problem)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for pair in pairs:
        if "".join(pair) not in vocabulary:
            raise ModelFileError(path, "field tokenizer.ggml.merges", f"{pair} does not merge into a known token")
    # Llama 3 takes a whole word that is a token without looking at the merges.
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre_tokenizer == "llama-bpe"))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, token_type in zip(tokens, token_types, strict=False) if token_type == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    return tokenizer
