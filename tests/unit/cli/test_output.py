"""What the commands print."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from tandem.cli import main
from tandem.cli.status import RouterAnswer, as_text, table
from tandem.cli.terminal import Terminal
from tandem.v1 import bus_pb2, router_pb2, types_pb2


def test_columns_are_as_wide_as_they_need_to_be_and_numbers_stand_right() -> None:
    assert table(("name", "n"), [("a", 5), ("long-name", 100)]) == [
        "name         n",
        "a            5",
        "long-name  100",
    ]
    assert table(("name",), []) == ["name", "(none)"]


def test_status_shows_a_worker_with_the_role_it_has_now() -> None:
    worker = router_pb2.WorkerState(
        info=bus_pb2.WorkerInfo(
            ref=types_pb2.WorkerRef(id="w-1"), model="m", role=types_pb2.ROLE_PREFILL, kv_blocks_total=64
        ),
        load=bus_pb2.LoadReport(role=types_pb2.ROLE_DECODE, running_requests=3, kv_blocks_used=9),
        liveness="alive",
    )
    leader = router_pb2.Leader(model="m", router="router", epoch=7, self=True)
    text = "\n".join(as_text(None, RouterAnswer([worker], [leader])))
    assert "decode" in text and "prefill\n" not in text
    assert "9/64" in text
    assert "router" in text


def test_status_shows_who_waits_and_what_is_booked() -> None:
    worker = router_pb2.WorkerState(
        info=bus_pb2.WorkerInfo(ref=types_pb2.WorkerRef(id="w-1"), model="m", kv_blocks_total=64), liveness="alive"
    )
    books = router_pb2.GetAccountingResponse(
        queued=3,
        queued_tokens=777,
        oldest_wait_s=1.25,
        in_flight=5,
        queue_by_class=[router_pb2.QueueDepth(name="batch", requests=3, tokens=777), router_pb2.QueueDepth(name="top")],
        workers=[router_pb2.Booked(worker="w-1", in_flight=5, kv_blocks_in_use=17)],
    )
    answer = RouterAnswer([worker], [router_pb2.Leader(model="m", router="router", epoch=7)], {"m": books})
    lines = [line.split() for line in as_text(None, answer)]
    assert ["m", "router", "7", "5", "3", "777", "1.2", "s"] in lines
    assert ["m", "class", "batch", "3", "777"] in lines
    assert not any("top" in line for line in lines)
    assert next(line for line in lines if line[:1] == ["w-1"])[-2:] == ["5", "17"]


def test_lines_carry_the_name_of_their_process(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(on_gone=lambda: None)
    terminal.expect(["router", "a-long-name"])
    terminal.line("router", "hello")
    terminal.note("ready")
    assert capsys.readouterr().out == "router      | hello\ntandem      | ready\n"


class Fake(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers `ping` with `p`, `ong`, and `break` with half a stream."""

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": "the-model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = body["messages"][-1]["content"]
        if body["model"] != "the-model":
            return self._answer(404, b'{"error": {"message": "no such model"}}')
        if said == "fail":
            return self._answer(200, b'data: {"error": {"message": "the worker died"}}\n\n')
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in ("p", "ong")]
        lines = [b": waiting\n\n", *(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)]
        if said != "break":
            lines.append(b"data: [DONE]\n\n")
        self._answer(200, b"".join(lines))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_chat_prints_the_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["chat", "--url", url, "ping"]) == 0
    assert capsys.readouterr().out == "pong\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ping", "--model", "other"], "answered 404: no such model"),
        (["fail"], "the worker died"),
        (["break"], "ended the stream in the middle"),
    ],
)
def test_chat_says_what_went_wrong(
    url: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.dispatch(["chat", "--url", url, *arguments]) == main.EXIT_MISTAKE
    assert words in capsys.readouterr().err


def test_chat_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["chat", "--url", "http://127.0.0.1:1", "ping"]) == main.EXIT_MISTAKE
    assert "no answer from http://127.0.0.1:1" in capsys.readouterr().err
    assert main.dispatch(["chat", "--url", "127.0.0.1:1", "ping"]) == main.EXIT_MISTAKE


def test_a_conversation_goes_on_after_an_error(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["fail", "/new", "", "ping"])

    def typed(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main.dispatch(["chat", "--url", url]) == 0
    captured = capsys.readouterr()
    assert "pong" in captured.out
    assert "the worker died" in captured.err
