"""The simulated KV plane: how a simulated engine reads another one's blocks.

Real KV transfers are one-sided reads that nobody authorises. Here a consumer asks the producer, over a small TCP
connection, what the named blocks hold, and waits as long as the bytes would take. It reads at the *end* of that time,
so a lease that ended meanwhile gives it whatever is in those blocks then, as with real memory. A dead producer
refuses or drops the connection; a hung one answers nothing, and the reader waits until it is cancelled.

One JSON object a line. -> {"open": handoff, "engine": id}  <- {"ok": bool}
                        -> {"read": [blocks]}               <- {"contents": [...]}
                        -> {"done": handoff}                   (the producer frees the blocks)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tandem.errors import HandoffFailed

_LINE_LIMIT = 16 << 20
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class KvSource:
    """The connector's part of a handoff: where the blocks are."""

    host: str
    port: int
    engine_id: str
    handoff_id: str
    blocks: tuple[int, ...]

    def dump(self) -> bytes:
        return json.dumps(
            {"host": self.host, "port": self.port, "engine_id": self.engine_id, "handoff_id": self.handoff_id,
             "blocks": self.blocks}
        ).encode()  # fmt: skip

    @classmethod
    def parse(cls, raw: bytes, num_blocks: int) -> KvSource:
        """HandoffFailed unless it names exactly ``num_blocks`` distinct blocks."""
        try:
            data = json.loads(raw)
            source = cls(
                str(data["host"]), int(data["port"]), str(data["engine_id"]), str(data["handoff_id"]),
                tuple(int(block) for block in data["blocks"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise HandoffFailed(f"malformed KV handoff: {error}") from error
        if len(source.blocks) != num_blocks or len(set(source.blocks)) != num_blocks or min(source.blocks) < 0:
            raise HandoffFailed(f"KV handoff names {len(set(source.blocks))} blocks, the prompt has {num_blocks}")
        return source


class KvServer:
    """Answers consumers on a loopback or private address."""

    def __init__(
        self,
        engine_id: str,
        read: Callable[[str, Sequence[int]], list[int]],
        done: Callable[[str], None],
    ) -> None:
        self._engine_id = engine_id
        self._read = read
        self._done = done
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, host, port, limit=_LINE_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        handoff_id = ""
        try:
            while line := await reader.readline():
                message = json.loads(line)
                answer: dict[str, object] = {}
                if "open" in message:
                    handoff_id = str(message["open"])
                    answer = {"ok": message["engine"] == self._engine_id}
                elif "read" in message:
                    answer = {"contents": self._read(handoff_id, message["read"])}
                else:
                    self._done(handoff_id)
                    break
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, KeyError, IndexError, RuntimeError):
            pass  # a peer that went away or speaks nonsense loses its connection, no more
        finally:
            self._writers.discard(writer)
            writer.close()


async def read_blocks(source: KvSource, blocks: Sequence[int], transfer_s: Callable[[], float]) -> list[int] | None:
    """What ``blocks`` of the producer hold, after ``transfer_s()`` seconds; None if it is gone.

    Waits for a hung one until cancelled.
    """
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(source.host, source.port, limit=_LINE_LIMIT)
    except (OSError, TimeoutError):
        return None
    try:
        answer = await _ask(reader, writer, {"open": source.handoff_id, "engine": source.engine_id})
        if not answer["ok"]:
            return None
        with suppress(TimeoutError):
            async with asyncio.timeout(transfer_s()):
                await reader.readline()  # nothing comes, except the end of a producer that dies
                return None
        contents = (await _ask(reader, writer, {"read": list(blocks)}))["contents"]
        writer.write(json.dumps({"done": source.handoff_id}).encode() + b"\n")
        await writer.drain()
        return [int(content) for content in contents] if len(contents) == len(blocks) else None
    except (OSError, EOFError, ValueError, KeyError, RuntimeError):  # the last: uvloop, of a connection that is lost
        return None
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: object) -> dict[str, list[int]]:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()
    line = await reader.readline()
    if not line:
        raise EOFError("the producer closed the connection")
    answer: dict[str, list[int]] = json.loads(line)
    return answer
