"""Calls that the request demands: the engine is held to their JSON, so the whole answer is nothing else."""

from __future__ import annotations

from services.frontend.parsers.output import Call, OutputParser, Parsed, read_calls


class _Whole(OutputParser):
    def __init__(self) -> None:
        self._text: list[str] = []

    def push(self, text: str) -> Parsed:
        self._text.append(text)
        return Parsed()


class Named(_Whole):
    """The answer is the arguments of one tool; cut off at its length, they are as far as they came."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def finish(self) -> Parsed:
        return Parsed(calls=[Call(self._name, "".join(self._text))])


class Required(_Whole):
    """The answer is a list of {"name", "parameters"}."""

    def finish(self) -> Parsed:
        text = "".join(self._text)
        try:
            return Parsed(calls=read_calls(text))
        except ValueError:
            return Parsed(text)  # cut off
