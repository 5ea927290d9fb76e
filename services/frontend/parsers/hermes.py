"""Hermes and Qwen: each call between <tool_call> and </tool_call>, as {"name", "arguments"}."""

from __future__ import annotations

import msgspec

from services.frontend.parsers.output import Margins, OutputParser, Parsed, held_back, read_call

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(OutputParser):
    markers = (OPEN, CLOSE)

    def __init__(self) -> None:
        self._margins = Margins()
        self._text = ""
        #: Where in ``_text`` to look for CLOSE; None outside of a call.
        self._search: int | None = None

    def push(self, text: str) -> Parsed:
        self._text += text
        out = Parsed()
        while self._step(out):
            pass
        return out

    def finish(self) -> Parsed:
        out = Parsed()
        if self._search is not None:
            self._read(self._text, "", out)  # a model that ends right after its call may leave CLOSE out
        else:
            out.text += self._margins.text(self._text)
        self._text = ""
        out.text += self._margins.finish()
        return out

    def _step(self, out: Parsed) -> bool:
        """Takes the next part from ``_text``. False when more is needed to tell what it is."""
        if self._search is None:
            before, found, rest = self._text.partition(OPEN)
            if found:
                out.text += self._margins.text(before)
                self._text, self._search = rest, 0
                return True
            keep = held_back(before, (OPEN,))
            out.text += self._margins.text(before[: len(before) - keep])
            self._text = before[len(before) - keep :]
            return False
        end = self._text.find(CLOSE, self._search)
        if end < 0:
            self._search = max(0, len(self._text) - len(CLOSE) + 1)
            return False
        if _within_string(self._text[:end]):
            self._search = end + len(CLOSE)
            return True
        body, self._text = self._text[:end], self._text[end + len(CLOSE) :]
        self._search = None
        self._read(body, CLOSE, out)
        return True

    def _read(self, body: str, close: str, out: Parsed) -> None:
        try:
            call = read_call(body)
        except ValueError:
            out.text += self._margins.text(OPEN + body + close)
        else:
            self._margins.call()
            out.calls.append(call)


def _within_string(body: str) -> bool:
    """Whether the JSON breaks off: then the CLOSE after it belongs to one of its strings."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        return body.count('"') - body.count('\\"') & 1 == 1 and "truncated" in str(error)
    except RecursionError:
        return False
    return False
