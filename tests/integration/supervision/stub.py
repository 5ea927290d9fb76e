"""A small child process for supervision tests: `python stub.py MODE DIR NAME`.

It writes ``DIR/NAME.ready`` when it is up and appends ``NAME`` to ``DIR/order`` when it is told to leave.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tandem.adapters import notify

LIFE_S = 120  # nothing of a test lives longer, whatever goes wrong


def main() -> None:
    mode, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    with (folder / f"{name}.starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    print(f"{name} begins", flush=True)
    if mode == "crash":
        print("the reason why", file=sys.stderr, flush=True)
        sys.exit(3)
    if mode == "mistake":
        print("error: no such option", flush=True)
        sys.exit(2)

    def leave(number: int, _: object) -> None:
        with (folder / "order").open("a") as file:
            file.write(f"{name}\n")
        (folder / f"{name}.signal").write_text(signal.Signals(number).name)
        if mode == "hand-over" and not (folder / f"{name}.go").exists():
            notify.stopping()
            return
        if mode != "stubborn":
            sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    if mode == "parent":
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LIFE_S})"])
        (folder / f"{name}.child").write_text(str(child.pid))
    if mode == "babble":
        print("x" * 40_000 + "\nlast", end="", flush=True)
    if mode != "never-ready":
        (folder / f"{name}.ready").write_text(str(os.getpid()))
    for _ in range(10 * LIFE_S):
        time.sleep(0.1)
        if mode == "hand-over" and (folder / f"{name}.go").exists():
            return


if __name__ == "__main__":
    main()
