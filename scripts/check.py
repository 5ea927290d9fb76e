"""Every check of the source, side by side; the whole output of what failed, one line for what did not.

python scripts/check.py [NAME...]
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT_S = 900

DOCKERFILES = sorted(str(path) for path in [*ROOT.glob("services/**/*Dockerfile"), *ROOT.glob("deploy/**/*Dockerfile")])

CHECKS: dict[str, Sequence[str]] = {
    "mypy": [sys.executable, "-m", "mypy"],
    "ruff": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "imports": [str(BIN / "lint-imports"), "--no-logo"],
    "proto-lint": [str(BIN / "buf"), "lint"],
    "proto-breaking": [str(BIN / "buf"), "breaking", "--against", "proto/baseline.binpb"],
    "proto-generated": [sys.executable, "scripts/proto.py", "--check"],
    "docs-generated": [sys.executable, "docs/generate.py", "--check"],
    "dockerfiles": [str(BIN / "hadolint"), *DOCKERFILES],
}


def run(name: str) -> tuple[str, int, str, float]:
    began = time.monotonic()
    try:
        done = subprocess.run(CHECKS[name], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        status, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, said = 1, f"not done after {LIMIT_S} s"
    return name, status, said, time.monotonic() - began


def main() -> int:
    names = sys.argv[1:] or list(CHECKS)
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no check {unknown[0]!r}; there are: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    failed = []
    with ThreadPoolExecutor(2) as pool:
        for name, status, said, took in pool.map(run, names):
            print(f"{'ok    ' if status == 0 else 'FAILED'} {name} ({took:.1f} s)", flush=True)
            if status:
                failed.append(name)
                print(said.rstrip(), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
