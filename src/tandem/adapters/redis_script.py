"""Lua scripts of the store, and what may be an argument of a Redis command."""

from __future__ import annotations

import hashlib
from importlib import resources

Argument = str | bytes | int | float


class Script:
    """Lua from this package's ``lua`` folder: the named files, one after the other, as one script."""

    def __init__(self, *names: str) -> None:
        folder = resources.files("tandem.adapters") / "lua"
        self.name = names[-1]
        self.source = "\n".join((folder / f"{name}.lua").read_text() for name in names)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
