"""What `tandem up` prints: every line with the name of the process that it came from, in colour on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

_RESET, _DIM, _BOLD, _RED = "\033[0m", "\033[2m", "\033[1m", "\033[31m"
_COLOURS = ("\033[36m", "\033[33m", "\033[35m", "\033[32m", "\033[34m", "\033[96m", "\033[93m", "\033[95m", "\033[92m")

_SUPERVISOR = "tandem"


class Terminal:
    """Writes whole lines. ``on_gone`` is called when nobody reads them any more."""

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self._width = len(_SUPERVISOR)
        self._colours: dict[str, str] = {}
        self._tty = sys.stdout.isatty()
        self._on_gone = on_gone
        self._gone = False

    def expect(self, names: Iterable[str]) -> None:
        """Processes that will write: they share one column and get a colour each."""
        for name in names:
            self._width = max(self._width, len(name))
            self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])

    def line(self, name: str, text: str) -> None:
        """A line that the process ``name`` wrote."""
        self._write(f"{self._paint(name.ljust(self._width), self._colours.get(name, ''))} | {text}")

    def note(self, text: str) -> None:
        """Something that the supervisor has to say."""
        self._write(f"{self._paint(_SUPERVISOR.ljust(self._width), _BOLD)} | {self._paint(text, _DIM)}")

    def plain(self, text: str) -> None:
        self._write(text)

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_RESET}" if self._tty and colour else text

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except (BrokenPipeError, ValueError):
            self._gone = True
            self._on_gone()


def complain(message: str) -> None:
    """An error, to people."""
    start, end = (_RED + _BOLD, _RESET) if sys.stderr.isatty() else ("", "")
    print(f"{start}error:{end} {message}", file=sys.stderr, flush=True)
