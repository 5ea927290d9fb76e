"""Coverage-guided fuzzing (atheris) of what reads the words of models and of clients.

    python -m tests.fuzz.guided --target parsers --runs 100000 [--seed 1]

``parsers``: a model's answer in pieces. Whatever it says, the parser does not fail, what comes out can be sent, and the
pieces' borders change nothing. ``bodies``: request bodies; each is taken, or refused with a client's error.
libFuzzer's exit status: 0 unless an input failed, which it then writes beside the working directory (crash-...).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["services.frontend", "tandem"]):
    import msgspec

    from services.frontend.http_errors import http_status
    from services.frontend.parsers.families import new_parser
    from services.frontend.parsers.forced import Named, Required
    from services.frontend.parsers.output import OutputParser, Parsed
    from tandem.errors import TandemError
    from tests.fuzz.hostile import CALLER, FAMILIES, FRAGMENTS, SEEDS, routes_of
    from tests.unit.frontend.conftest import write_byte_level

PARSERS = (*FAMILIES, ("required", ""), ("named", ""))
PROMPTS = ("", "<think>\n")
MAX_BYTES = 4_096


def _parser(kind: tuple[str, str], prompt: str) -> OutputParser:
    if kind[0] == "required":
        return Required()
    if kind[0] == "named":
        return Named("add")
    made = new_parser(*kind, prompt=prompt, tools=["add"])
    assert made is not None
    return made()


def _parse(parser: OutputParser, text: str, piece: int) -> Parsed:
    parsed = Parsed()
    for start in range(0, len(text), piece):
        parsed += parser.push(text[start : start + piece])
    return parsed + parser.finish()


def parsers(data: bytes) -> None:
    """First byte: which parser and prompt; second: the length of the pieces; the rest: what the model says."""
    if len(data) < 2:
        return
    kind, prompt = PARSERS[data[0] % len(PARSERS)], PROMPTS[data[0] // 64 % 2]
    text = data[2:].decode("utf-8", "replace")
    pieces = _parse(_parser(kind, prompt), text, 1 + data[1] % 17)
    whole = _parse(_parser(kind, prompt), text, len(text) or 1)
    msgspec.json.encode(pieces)
    assert pieces == whole, (kind, prompt, text, pieces, whole)


def bodies(folder: Path) -> Callable[[bytes], None]:
    """First byte: which route; the rest: the body."""
    runner = asyncio.Runner()
    routes = [*runner.run(_routes(folder)).items()]

    def one(data: bytes) -> None:
        if not data:
            return
        name, route = routes[data[0] % len(routes)]
        try:
            runner.run(_call(route, data[1:]))
        except TandemError as error:
            assert 400 <= http_status(error) < 500 and error.message, (name, error)

    return one


async def _routes(folder: Path):
    return routes_of(folder)


async def _call(route, body: bytes) -> None:
    await route(body, CALLER, 0.0)


def corpus(target: str, folder: Path) -> None:
    """Right answers and requests to start from."""
    if target == "parsers":
        seeds = [bytes([i, 3]) + fragment.encode("utf-8", "replace") for i in range(8) for fragment in FRAGMENTS]
    else:
        seeds = [bytes([i]) + json.dumps(one).encode() for i, name in enumerate(SEEDS) for one in SEEDS[name]]
    for number, seed in enumerate(seeds):
        (folder / f"{number:04}").write_bytes(seed[:MAX_BYTES])


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--target", choices=("parsers", "bodies"), required=True)
    options.add_argument("--runs", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    # Not removed at the end: libFuzzer leaves the process by itself.
    scratch = Path(tempfile.mkdtemp(prefix="tandem-fuzz-"))
    seeds, model = scratch / "corpus", scratch / "model"
    seeds.mkdir()
    model.mkdir()
    corpus(given.target, seeds)
    dictionary = scratch / "words"
    words = (word for word in FRAGMENTS if 1 < len(word) < 60 and word.isascii() and not {"\\", "\n"} & {*word})
    dictionary.write_text("".join(f"{json.dumps(word)}\n" for word in words))
    target = parsers if given.target == "parsers" else bodies(write_byte_level(model))
    flags = [f"-runs={given.runs}", f"-seed={given.seed}", f"-max_len={MAX_BYTES}", f"-dict={dictionary}"]
    flags += ["-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1", str(seeds)]
    atheris.Setup([sys.argv[0], *flags], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
