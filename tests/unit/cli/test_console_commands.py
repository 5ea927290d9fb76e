"""`tandem trace` and `tandem top`: what they print of what the console tells."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from services.console.spans import spans_of
from services.console.trace_ring import Trace
from services.console.trace_view import listed, whole
from tandem.cli import main
from tandem.cli.trace import as_text
from tests.unit.console.traces import export, request_spans

TOKEN = "a-token-of-some-length"
CLUSTER: dict[str, Any] = {
    "cluster": "c", "bus": True, "in_flight": 4, "recent": {"ttft_p50_s": 0.041, "requests_per_s": 3.0},
    "models": [{
        "model": "m", "leader": "router-1", "epoch": 7, "age_s": 0.2, "in_flight": 4,
        "queue": {"requests": 2, "tokens": 900, "oldest_wait_s": 1.5, "by_tenant": [],
                  "by_class": [{"name": "batch", "requests": 2, "tokens": 900}]},
        "workers": [{
            "id": "decode-1", "role": "decode", "state": "alive", "running": 3, "waiting": 0,
            "pending_prefill_tokens": 0, "kv_blocks_used": 50, "kv_blocks_total": 100, "booked_requests": 4,
            "booked_prefill_s": 0.01, "handoffs": 0,
        }],
    }],
}  # fmt: skip


def trace(**root: Any) -> Trace:
    made = Trace(f"{7:032x}", 1, {})
    for span in spans_of(export(*request_spans(7, **root))):
        made.add(span)
    return made


class Fake(http.server.BaseHTTPRequestHandler):
    """A console that knows one trace."""

    asked_with: str = ""

    def do_GET(self) -> None:
        Fake.asked_with = self.headers.get("authorization", "")
        answers: dict[str, tuple[int, Any]] = {
            "/api/traces/req-000007": (200, whole(trace())),
            "/api/traces?only=slow&limit=15": (200, {"traces": [listed(trace())]}),
            "/api/cluster": (200, CLUSTER),
            "/api/traces/locked": (401, {}),
        }
        status, body = answers.get(self.path, (404, {"error": {"message": "no such trace"}}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_waterfall_in_the_terminal(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["trace", "req-000007", "--console", url]) == 0
    out = capsys.readouterr().out
    assert "decode-2: 1,024 of 1,312 tokens cached, predicted 41 ms; decode-1 would have been 118 ms." in out
    assert "First token after 50 ms." in out and "prefill on decode-2 36 ms" in out
    bars = {line.split()[0]: line.split("│")[1] for line in out.splitlines() if "│" in line}
    assert list(bars) == ["chat", "route", "queue", "prefill", "decode"]
    assert len({len(bar) for bar in bars.values()}) == 1
    begins = {name: len(bar) - len(bar.lstrip()) for name, bar in bars.items()}
    assert begins["chat"] == 0 and begins["prefill"] < begins["decode"]
    assert "\033" not in out  # nobody's terminal
    lengths = {name: len(bar.strip()) for name, bar in bars.items()}
    assert lengths["decode"] / lengths["chat"] == pytest.approx(160 / 205, abs=0.05)


def test_a_failure_and_retries_are_said() -> None:
    failed = whole(trace(error="worker_lost", ATTEMPTS=3))
    text = "\n".join(as_text(failed, 100))
    assert "It failed: worker_lost" in text and "3 attempts" in text
    coloured = "\n".join(as_text(failed, 100, colour=True))
    assert "\033[" in coloured


@pytest.mark.parametrize("width", [20, 80, 400])
def test_no_width_breaks_it(width: int) -> None:
    assert any("█" in line for line in as_text(whole(trace()), width))


def test_the_newest_traces_are_listed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["trace", "--slow", "--console", url]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["req-000007", "acme", "chat", "1312"]


def test_top_prints_once_where_nobody_watches(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["top", "--console", url]) == 0
    out = capsys.readouterr().out
    assert "4 in flight" in out and "2 waiting (900 tokens, oldest 1.50 s)" in out and "batch 2" in out
    row = next(line for line in out.splitlines() if line.startswith("decode-1"))
    assert "█████░░░░░" in row and "50%" in row and "\033" not in out


def test_the_token_goes_along(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CONSOLE_TOKEN", TOKEN)
    assert main.dispatch(["top", "--console", url, "--once"]) == 0
    assert Fake.asked_with == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trace", "nothing"], "no such trace"),
        (["trace", "locked"], "TANDEM_CONSOLE_TOKEN"),
        (["trace", "--slow", "--failed"], "one of them"),
        (["trace", "--last", "0"], "--last must be"),
        (["top", "--interval", "0"], "--interval must be"),
    ],
)
def test_mistakes_are_one_message(
    url: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.dispatch([*arguments, "--console", url]) == main.EXIT_MISTAKE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("where", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_no_console_there(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["top", "--console", where]) == main.EXIT_MISTAKE
    assert "console" in capsys.readouterr().err
