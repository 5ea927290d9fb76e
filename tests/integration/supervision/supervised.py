"""A whole supervisor as a process of its own, to be killed: `python supervised.py DIR NAME...` keeps stubs running."""

import asyncio
import sys
from pathlib import Path

from tandem.adapters.processes import run_directly
from tandem.adapters.supervision import ProcessSpec, Supervisor

STUB = Path(__file__).with_name("stub.py")


async def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    supervisor = Supervisor(on_line=lambda *_: None, on_news=lambda *_: None)

    def spec(name: str) -> ProcessSpec:
        async def ready() -> bool:
            return (folder / f"{name}.ready").exists()

        argv = [sys.executable, str(STUB), "serve", str(folder), name]
        return ProcessSpec(name=name, launch=run_directly(argv), env={}, ready=ready)

    for name in names:
        supervisor.add(spec(name))
    await supervisor.wait_ready(names)
    print("up", flush=True)
    await asyncio.sleep(120)


asyncio.run(main())
