"""What a process pays that has slept: memory leaves the caches, sooner on a machine that is shared.

    python -m bench.cold_memory [--kib 128 512 1024] [--slept-ms 0 1 2 5 10]

Nanoseconds of CPU per cache line read, by how much memory is touched and how long the process slept before; and as a
control a thousand steps of arithmetic without memory, which should not depend on sleep. A request touches 1 to 1.5 MB
of the frontend (docs/decisions/cold-memory.md), so these figures say how much slower than ``bench.hot_path`` it is
live, and whether two runs of ``bench.serve`` had the same machine.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument("--slept-ms", type=float, nargs="*", default=[0, 1, 2, 5, 10])
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "cold_memory"))
        subprocess.run(["cc", "-O2", "-o", program, str(SOURCE)], check=True)
        print("slept, ms | " + " | ".join(f"{kib} KiB, ns a line" for kib in args.kib) + " | 1,000 steps, ns")
        for slept_ms in args.slept_ms:
            rows = [_measured(program, kib, slept_ms, args.rounds) for kib in [*args.kib, 0]]
            print(f"{slept_ms:9g} | " + " | ".join(f"{ns:.1f}" for ns in rows), flush=True)


def _measured(program: str, kib: int, slept_ms: float, rounds: int) -> float:
    command = [program, str(kib), str(round(1000 * slept_ms)), str(rounds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


if __name__ == "__main__":
    main()
