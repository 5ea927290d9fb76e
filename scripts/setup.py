"""Sets up .venv for one of two engines, step by step; a step whose inputs have not changed is skipped.

    python3.11 scripts/setup.py [--engine vllm|sim] [--dev] [--this-python]

Standard library only: this runs before anything is installed. pip works quietly; what it said is in .venv/setup.log,
and its last words are shown when a step fails.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

WANTED = (3, 11)
if sys.version_info[:2] != WANTED:  # up here: an older Python could not run the rest
    sys.exit(
        "error: Tandem needs Python 3.11, and this is Python {}.{} ({}).\n"
        "hint:  install Python 3.11, or name it: make PYTHON=/path/to/python3.11 ...".format(
            *sys.version_info[:2], sys.executable
        )
    )

import tomllib  # noqa: E402  (no older Python has it)

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
LOCKS = ROOT / "requirements"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: Room that .venv and pip's cache take on top of each other, in MiB.
ROOM_MIB = {"sim": 1_000, "vllm": 6_000}
STEP_LIMIT_S = 3600
#: Pythons of one version differ: one built without profile-guided optimisation takes half as long again. Prints what a
#: venv is made from, whether the core could be compiled with it, and seconds for a little of what services do.
PROBE = """
import ensurepip, json, os, sys, sysconfig, time, venv
class Thing:
    def __init__(self, x): self.x = x
    def add(self, y): return self.x + y
def spin():
    began, table = time.process_time(), {}
    for i in range(40_000):
        thing = Thing(i); table[i & 1023] = [thing.add(3), "%d" % i]
    return time.process_time() - began
program = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
headers = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
took = min(spin() for _ in range(9))
print(json.dumps([list(sys.version_info[:2]), program if os.path.exists(program) else sys.executable, headers, took]))
"""
#: Another Python than the one that runs this is taken only for that much: the machine may be noisy.
MUCH_FASTER = 0.85


class StepFailed(Exception):
    """What to tell the person."""


class Step(NamedTuple):
    name: str
    title: str
    #: Files, or text, whose content decides whether the step must run again.
    inputs: "Sequence[Path | str]"
    run: Callable[[], None]


def pip(*arguments: str) -> None:
    """One quiet pip call, with a sign of life while it lasts."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    with LOG.open("a") as log:
        print("\n$", *command, file=log, flush=True)
        start = log.tell()
        status = watch(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))
    if status:
        with LOG.open() as log:
            log.seek(start)
            said = [line.rstrip() for line in log if line.strip() and not line.startswith("WARNING")]
        raise StepFailed("\n".join(["pip could not install this:", *(f"  {line[:300]}" for line in said[-12:])]))


def watch(process: "subprocess.Popen[bytes]") -> int:
    began, shown, tty = time.monotonic(), 0.0, sys.stdout.isatty()
    while True:
        try:
            status = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            waited = time.monotonic() - began
            if waited > STEP_LIMIT_S:
                process.kill()
                raise StepFailed(f"gave up after {STEP_LIMIT_S} s") from None
            if tty:
                print(f"\r      {waited:.0f} s ", end="", flush=True)
            elif waited - shown >= 30:
                shown = waited
                print(f"      still at it, {waited:.0f} s", flush=True)
            continue
        if tty:
            print("\r\033[K", end="")
        return status


class Interpreter(NamedTuple):
    path: str
    has_headers: bool
    seconds: float


def probe(program: str) -> "Interpreter | None":
    """None if it is not the right version, or cannot make virtual environments."""
    try:
        done = subprocess.run([program, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60)
        version, path, has_headers, seconds = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Interpreter(path, has_headers, seconds) if tuple(version) == WANTED else None


def choose_python(own: str) -> str:
    """The fastest Python of the right version on PATH, if it is much faster than ``own`` and lacks nothing."""
    names = (f"python{WANTED[0]}.{WANTED[1]}", "python3")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = {str(Path(folder, name).resolve()) for folder in folders for name in names if Path(folder, name).exists()}
    mine = probe(own)
    if mine is None:
        return own
    others = [other for program in sorted(found) if (other := probe(program)) is not None and other.path != mine.path]
    able = [other for other in others if other.has_headers >= mine.has_headers]
    best = min(able, key=lambda other: other.seconds, default=mine)
    if best.seconds > mine.seconds * MUCH_FASTER:
        return own
    print(f"      with {best.path}: {mine.seconds / best.seconds:.1f} times as fast as {own}", flush=True)
    return best.path


def make_venv(this_python: bool) -> None:
    """Takes a virtual environment that is there already and works; else makes it from scratch."""
    if is_venv():
        return
    # Python itself, not a shim or another venv's link: the venv must outlive both.
    base = Path(sys.base_prefix, "bin", f"python{WANTED[0]}.{WANTED[1]}")
    own = str(base if base.exists() else sys.executable)
    chosen = own if this_python else choose_python(own)
    command = [chosen, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise StepFailed((done.stdout + done.stderr).strip() or "python -m venv failed")


def is_venv() -> bool:
    """Whether .venv holds the right Python, with pip, and was not moved here from elsewhere."""
    if not PYTHON.exists():
        return False
    code = f"import sys, pip; print(sys.version_info[:2] == {WANTED!r} and sys.prefix)"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, timeout=60)
    scripts = (VENV / "bin/pip").read_text(errors="replace") if (VENV / "bin/pip").exists() else ""
    return done.stdout.strip() == str(VENV) and str(VENV) in scripts


def install_torch() -> None:
    """The CPU build where pip is configured to look, or on PyTorch's own index; last, whatever build there is."""
    pinned = str(LOCKS / "torch.lock")
    plain = "torch==2.13.0"
    attempts = (
        ("--no-deps", "-r", pinned),
        ("--no-deps", "-r", pinned, "--index-url", TORCH_CPU_INDEX, "--retries", "2"),
        (plain,),
    )
    problems = []
    for attempt in attempts:
        try:
            return pip(*attempt)
        except StepFailed as problem:
            problems.append(str(problem))
    raise StepFailed(problems[1])


def make_model(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "tandem.models.prepare", *arguments]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=STEP_LIMIT_S).returncode:
        raise StepFailed("the model could not be made; see above")


def compile_core() -> None:
    """Tandem runs without it, so a machine where it cannot be done is told, and goes on."""
    if not shutil.which("cc") and not shutil.which("gcc"):
        return print(
            "      skipped, no C compiler here: placements and simulations take about twice as long", flush=True
        )
    with LOG.open("a") as log:
        command = [str(PYTHON), "scripts/compile.py"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        if watch(process):
            print(
                f"      failed, see {LOG.relative_to(ROOT)}: Tandem runs as Python alone, a little slower", flush=True
            )


def steps(engine: str, dev: bool, this_python: bool = False) -> "list[Step]":
    def lock(name: str) -> Path:
        return LOCKS / f"{name}.lock"

    def locked(name: str, title: str) -> Step:
        return Step(name, title, [lock(name)], lambda: pip("--no-deps", "-r", str(lock(name))))

    plan = [
        Step("venv", "virtual environment", [], lambda: make_venv(this_python)),
        locked("base", "packages of the services"),
        Step(
            "project",
            "Tandem itself",
            [packaging()],
            lambda: pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
        ),
    ]
    compiled = [ROOT / "scripts/compile.py", ROOT / "src/tandem/compiled.py"]
    compiled += [
        path for name in ("core", "enginemodel", "sim") for path in sorted((ROOT / "src/tandem" / name).glob("*.py"))
    ]
    plan.append(Step("compiled", "decision core as machine code (about a minute)", compiled, compile_core))
    if dev:
        plan.append(locked("dev", "packages of the tests and checks"))
    if engine == "vllm":
        plan.append(Step("torch", "torch, CPU build (about 200 MB)", [lock("torch")], install_torch))
        plan.append(locked("engine-cpu", "vLLM and its packages (about 700 MB, some minutes)"))
    plan.append(locked("model", "the model's package (about 100 MB)"))
    recipe = sorted((ROOT / "src/tandem/models").glob("*.py"))
    if engine == "vllm":
        plan.append(Step("model-folder", "model folder", recipe, make_model))
    else:
        plan.append(Step("tokenizer-folder", "tokenizer folder", recipe, lambda: make_model("--tokenizer-only")))
    return plan


def packaging() -> str:
    """The part of pyproject.toml that an installation depends on; most of it configures tools."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return repr([data["build-system"], data["project"], data["tool"]["setuptools"]])


def stamp_of(step: Step) -> Path:
    return VENV / "stamps" / step.name


def digest_of(step: Step) -> str:
    digest = hashlib.sha256(str(ROOT).encode())  # a venv that was moved is not the same venv
    for item in step.inputs:
        digest.update(item.encode() if isinstance(item, str) else item.read_bytes())
    return digest.hexdigest()


def is_done(step: Step) -> bool:
    stamp = stamp_of(step)
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == digest_of(step)


def check_machine(engine: str) -> None:
    if sys.platform != "linux":
        raise StepFailed(f"Tandem runs on Linux; this is {platform.system()}.")
    if engine == "vllm" and platform.machine() != "x86_64":
        raise StepFailed(f"the vLLM engine comes for x86-64; this is {platform.machine()}. ENGINE=sim works.")
    free = shutil.disk_usage(ROOT).free >> 20
    if free < ROOM_MIB[engine]:
        raise StepFailed(f"{ROOT} has {free:,} MiB free; {ROOM_MIB[engine]:,} MiB are needed. Free some space.")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=sorted(ROOM_MIB), default="vllm")
    parser.add_argument("--dev", action="store_true", help="what tests and checks need, too")
    parser.add_argument(
        "--this-python", action="store_true", help="do not look for a faster Python of the same version"
    )
    args = parser.parse_args()
    todo = [step for step in steps(args.engine, args.dev, args.this_python) if not is_done(step)]
    if not todo:
        return 0
    step = todo[0]
    try:
        check_machine(args.engine)
        for number, step in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {step.title}", flush=True)
            began = time.monotonic()
            step.run()
            stamp_of(step).parent.mkdir(exist_ok=True)
            stamp_of(step).write_text(digest_of(step))
            print(f"      done in {time.monotonic() - began:.0f} s", flush=True)
    except StepFailed as problem:
        print(f"error: {step.title}: {problem}", file=sys.stderr)
        if LOG.exists():
            print(f"hint:  everything that pip said is in {LOG.relative_to(ROOT)}", file=sys.stderr)
        return 1
    except OSError as problem:
        print(f"error: {step.title}: {problem.strerror or problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the next run goes on here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
