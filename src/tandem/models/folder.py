"""A model folder that is either whole or not there.

``make_folder`` fills a temporary folder beside the target, writes a manifest (size and XXH3 of every file) into it
and renames it into place; a second process waits on a lock meanwhile. ``is_whole`` reads everything back against the
manifest: 270 MB take a tenth of a second once they are in the page cache, where the engine needs them anyway.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from tandem.errors import ConfigError

MANIFEST = "tandem-model.json"
_LOCK_TIMEOUT_S = 600.0


def is_whole(folder: Path, recipe: str) -> bool:
    """Whether ``folder`` was made by this very recipe and every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
        return manifest["recipe"] == recipe and all(
            (folder / name).stat().st_size == size and _digest(folder / name) == digest
            for name, (size, digest) in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_folder(target: Path, recipe: str, needed_bytes: int, fill: Callable[[Path], None]) -> bool:
    """Makes ``target`` whole, by ``fill(folder)`` if it is not yet. True if it had to. ConfigError: no room."""
    if is_whole(target, recipe):
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if is_whole(target, recipe):  # somebody else made it while we waited
                return False
            free = shutil.disk_usage(target.parent).free
            if free < needed_bytes:
                raise ConfigError(
                    f"No room for the model: {target.parent} has {free >> 20} MiB free, {needed_bytes >> 20} MiB are "
                    "needed. Free some space, or point XDG_CACHE_HOME to a larger disk.",
                    param="XDG_CACHE_HOME",
                )
            _build(target, recipe, fill)
    except OSError as e:
        reason = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise ConfigError(
            f"Cannot write the model folder {target}: {reason}. XDG_CACHE_HOME says where it goes.",
            param="XDG_CACHE_HOME",
        ) from e
    return True


def _build(target: Path, recipe: str, fill: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        fill(fresh)
        files = {p.name: (p.stat().st_size, _digest(p)) for p in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps({"recipe": recipe, "files": files}, indent=1))
        for path in fresh.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():  # broken, or made by an older recipe
            target.rename(Path(scratch, "old"))
        fresh.rename(target)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel drops it when the holder dies."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"Another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s.") from None
                time.sleep(0.1)
        yield
