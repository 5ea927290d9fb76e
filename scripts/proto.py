"""Generates src/tandem/v1 from proto/tandem/v1.

python scripts/proto.py              write it
python scripts/proto.py --check      fail if it is not what is committed
python scripts/proto.py --baseline   declare the present wire released: `make check` compares with it from then on
"""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
TARGET = ROOT / "src"
BASELINE = SOURCES / "baseline.binpb"


def generate(target: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCES}"]
    command += [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    command += sorted(str(path) for path in SOURCES.rglob("*.proto"))
    subprocess.run(command, check=True, timeout=120)


def check() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = sorted(path.relative_to(scratch) for path in Path(scratch).rglob("*.py*"))
        stale = [str(p) for p in fresh if not (TARGET / p).exists() or not same(Path(scratch, p), TARGET / p)]
    known = {str(path) for path in fresh}
    generated = [p.relative_to(TARGET) for p in (TARGET / "tandem/v1").glob("*_pb2*.py*")]
    stale += [f"{path} (no longer generated)" for path in map(str, generated) if path not in known]
    if stale:
        print("generated code is not up to date (run `make proto`):", *stale, sep="\n  ")
    return 1 if stale else 0


def same(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


def main() -> int:
    if "--check" in sys.argv[1:]:
        return check()
    if "--baseline" in sys.argv[1:]:
        buf = Path(sys.executable).parent / "buf"
        return subprocess.run([buf, "build", "-o", str(BASELINE)], cwd=ROOT, timeout=120).returncode
    generate(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
