"""Text to tokens and back: encoding, chat templates, and incremental decoding for streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from fi_core.errors import ArgumentError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Message = Mapping[str, str]
"""One turn of a chat: ``role`` ("system", "user", "assistant") and ``content``."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _check_text(argument: str, text: object) -> None:
    """Raise ArgumentError unless ``text`` is a string that has an encoding."""
    if not isinstance(text, str):
        raise ArgumentError(argument, "a string", repr(text))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ArgumentError(argument, "text without lone surrogates", ascii(text))


class TextCodec:
    """A tokeniser with its chat template.

    ``prefix_ids`` are put before an encoded prompt (a BOS token); None leaves that to the tokeniser's own rules.
    ``special_texts`` (``bos_token``, ``eos_token``) are variables of the chat template. Raises ArgumentError for a
    ``chat_template`` that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix_ids: Sequence[int] | None,
        chat_template: str | None,
        special_texts: Mapping[str, str],
    ) -> None:
        self.tokenizer = tokenizer
        self._prefix_ids = prefix_ids
        self._special_texts = dict(special_texts)
        self._template: jinja2.Template | None = None
        if chat_template is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _raise
            try:
                self._template = environment.from_string(chat_template)
            except jinja2.TemplateError as error:
                raise ArgumentError("chat_template", "a Jinja template", error) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; special tokens written in the text count as such."""
        _check_text("prompt", text)
        if self._prefix_ids is None:
            return list(self.tokenizer.encode(text).ids)
        return [*self._prefix_ids, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins."""
        if self._template is None:
            raise ArgumentError("messages", "a model with a chat template", "a model without one")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ArgumentError("messages", "mappings with the keys role and content", repr(message))
            if set(message) != {"role", "content"}:
                raise ArgumentError("messages", "the keys role and content in each", sorted(message))
            for name, text in message.items():
                _check_text(f"messages: {name}", text)
        values: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True, **self._special_texts}
        try:
            text = self._template.render(values)
        except jinja2.TemplateError as error:
            raise ArgumentError("messages", "what the model's chat template accepts", error) from error
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Decodes a request's tokens one by one; text of a character that is not complete yet is held back."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._context = 0
        self._done = 0

    def fork(self) -> TextStream:
        """A stream that stands where this one does and goes on by itself."""
        other = TextStream(self._codec)
        other._ids, other._context, other._done = list(self._ids), self._context, self._done
        return other

    def anew(self) -> TextStream:
        """A stream of the same tokeniser that has seen nothing."""
        return TextStream(self._codec)

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none."""
        self._ids.append(token)
        new = self._undecoded()
        if new.endswith(_REPLACEMENT):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return new

    def finish(self) -> str:
        """What was held back, as it is: no more tokens come."""
        new = self._undecoded()
        self._done = len(self._ids)
        return new

    def _undecoded(self) -> str:
        # The tokens before give a decoder the context that decides on spaces.
        before = self._codec.decode(self._ids[self._context : self._done])
        return self._codec.decode(self._ids[self._context :])[len(before) :]
