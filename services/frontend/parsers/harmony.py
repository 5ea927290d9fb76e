"""gpt-oss's Harmony format, by the ``openai_harmony`` package: channels for reasoning and answer, calls as recipients.

The package comes with vLLM; without it, as the extra ``harmony``.
"""

from __future__ import annotations

import functools
from typing import Any

from services.frontend.parsers.output import Call, OutputParser, Parsed, held_back
from tandem.errors import ConfigError

_CALLED = "functions."
_MARKERS = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
)


@functools.cache
def encoding() -> Any:
    """ConfigError if the package or its vocabulary is not there."""
    try:
        import openai_harmony
    except ImportError:
        raise ConfigError("the parser `harmony` needs a package: pip install 'tandem-serve[harmony]'") from None
    try:
        return openai_harmony.load_harmony_encoding("HarmonyGptOss")
    except (openai_harmony.HarmonyError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"the vocabulary of the parser `harmony` cannot be loaded: {error} "
            "(TIKTOKEN_ENCODINGS_BASE may name a folder that has it)"
        ) from None


class Harmony(OutputParser):
    markers = _MARKERS

    def __init__(self) -> None:
        import openai_harmony

        self._encoding = encoding()
        self._error = openai_harmony.HarmonyError
        self._content = openai_harmony.StreamState.CONTENT
        self._stream = openai_harmony.StreamableParser(self._encoding, role=openai_harmony.Role.ASSISTANT)
        self._text = ""
        #: Name and arguments so far of the call that is being written.
        self._call: tuple[str, list[str]] | None = None
        #: It has left the format: the rest is text.
        self._broken = False
        #: What came before the first content: the answer, if none comes.
        self._unsaid = ""
        self._said = False

    def push(self, text: str) -> Parsed:
        self._text += text
        return self._take(len(self._text) - held_back(self._text, _MARKERS))

    def finish(self) -> Parsed:
        out = self._take(len(self._text))
        self._close_call(out)
        if not self._said:
            out.text += self._unsaid
        return out

    def _take(self, length: int) -> Parsed:
        taken, self._text = self._text[:length], self._text[length:]
        out = Parsed()
        if not self._said:
            self._unsaid += taken
        if self._broken:
            out.text = taken
        elif taken:
            tokens = self._encoding.encode(taken, allowed_special="all")
            for i, token in enumerate(tokens):
                try:
                    self._stream.process(token)
                except self._error:
                    self._broken = self._said = True
                    self._close_call(out)
                    out.text += self._encoding.decode(tokens[i:])
                    break
                self._sort(out)
        return out

    def _sort(self, out: Parsed) -> None:
        stream = self._stream
        if stream.state != self._content:
            self._close_call(out)
            return
        self._said = True
        recipient, delta = stream.current_recipient or "", stream.last_content_delta or ""
        if recipient.startswith(_CALLED):
            if self._call is None:
                self._call = (recipient.removeprefix(_CALLED), [])
            self._call[1].append(delta)
        elif stream.current_channel == "analysis":
            out.reasoning += delta
        else:
            out.text += delta

    def _close_call(self, out: Parsed) -> None:
        if self._call is not None:
            name, arguments = self._call
            self._call = None
            out.calls.append(Call(name, "".join(arguments)))
