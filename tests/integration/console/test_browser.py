"""The page in a headless Chromium, in front of a running cluster: every view is used, and compared with the API."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tandem.sim import cli as sim_cli
from tests.harness.client import Client
from tests.harness.cluster import Cluster, wait_for

START_S = 90.0
MODEL = "words"
WORKERS = {"prefill-1", "decode-1", "decode-2"}
SIM = {"engine": "sim", "engine_args": {"step_s": 0.02}}
DEPLOYMENT: dict[str, Any] = {
    "policy": {"local_prefill": False},
    "models": [
        {
            "name": MODEL,
            "path": "SmolLM2-135M-Instruct",
            "pools": [{"role": "prefill", **SIM}, {"role": "decode", "replicas": 2, **SIM}],
        }
    ],
}
#: Where to leave pictures, for whoever wants to look.
PICTURES = os.environ.get("CONSOLE_PICTURES", "")
EVERY_VIEW = ("map", "cluster", "traces", "try")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("NO CHROMIUM ON THIS MACHINE: the console's page is not tested (apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def cluster(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(DEPLOYMENT, tmp_path_factory.mktemp("console")) as made:
        yield made.start(START_S)


@pytest.fixture(scope="module")
def load(cluster: Cluster) -> Iterator[None]:
    """A few requests at any time."""
    leave = threading.Event()

    def ask(seed: int) -> None:
        client = Client(cluster.grpc, MODEL)
        while not leave.is_set():
            seed += 1000
            client.generate([300 + (seed + i) % 5000 for i in range(200)], 60)
        client.close()

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    yield
    leave.set()
    for thread in threads:
        thread.join(30)


class Seen:
    """A page, and what it complained about."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, scheme: Any = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.url = url
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.set_default_timeout(30_000)
        self.page.goto(url)
        expect(self.page.locator("#link")).to_have_text("live", timeout=30_000)

    def _console(self, message: Any) -> None:
        if message.type == "error" and "404" not in message.text:  # a trace that is not there yet is asked for again
            self.complaints.append(message.text)

    def view(self, name: str) -> Page:
        self.page.locator(f"nav a[data-view={name}]").click()
        expect(self.page.locator(f"#view-{name}")).to_be_visible()
        return self.page

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.screenshot(path=str(Path(PICTURES, f"{name}.png")))


@pytest.fixture
def seen(browser: Browser, cluster: Cluster, load: None) -> Iterator[Seen]:
    page = Seen(browser, cluster.state()["console"])
    yield page
    page.context.close()
    assert not page.complaints


def api(cluster: Cluster, path: str) -> Any:
    with urllib.request.urlopen(cluster.state()["console"] + path, timeout=10) as answer:
        return json.load(answer)


def ended(cluster: Cluster) -> dict[str, Any]:
    """A trace that is whole: the newest that has a placement, a transfer and a decode."""

    def find() -> dict[str, Any] | None:
        for trace in api(cluster, "/api/traces?limit=50")["traces"]:
            if trace["ended"] and trace["spans"] >= 7:
                return dict(api(cluster, f"/api/traces/{trace['trace_id']}"))
        return None

    found: dict[str, Any] = wait_for(find, 60, "a whole trace")
    return found


def settled(page: Page, script: str, right: Callable[[Any], bool], what: str) -> Any:
    """What the page's script gives, once it is right."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [page.evaluate(script)]
        return right(found[0])

    wait_for(look, 30, what)
    return found[0]


def test_the_map_has_a_row_for_each_worker_and_draws_what_it_does(seen: Seen, cluster: Cluster) -> None:
    page = seen.page
    rows = settled(page, "tandemMap.ordered.map(r => r.id)", lambda ids: set(ids) == WORKERS, "rows")
    assert rows[0] == "prefill-1"  # prompts first
    colours = """() => { const m = tandemMap, n = m.ring ? m.pixels.length : 0, found = new Set();
        for (let i = 0; i < n; i++) found.add(m.pixels[i]); return found.size; }"""
    settled(page, colours, lambda count: count > 6, "coloured columns")
    expect(page.locator("#map-note")).to_contain_text("1 px =")
    expect(page.locator("#map-note")).to_contain_text("a worker's report of 100 ms gives at most 8 spans")
    seen.picture("map-light")


def test_pointing_tells_and_clicking_opens_the_trace(seen: Seen) -> None:
    page = seen.page
    busy = """() => { const m = tandemMap; for (const [i, row] of m.ordered.entries()) for (const s of row.segments)
        if (row.role === 'decode' && s.kind === 2 && s.end - s.begin > 300 && s.begin > m.end - m.span * .8)
          return { x: m.x((s.begin + s.end) / 2), y: row.laneTop + (s.lane + .4) * row.laneEach, request: s.request };
        return null; }"""
    page.locator("#map-follow").click()  # hold it still
    spot = settled(page, busy, bool, "a request on the map")
    box = page.locator("#spacetime").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + spot["x"], box["y"] + spot["y"])
    expect(page.locator("#tip")).to_contain_text("decode")
    expect(page.locator("#tip")).to_contain_text("its trace")
    expect(page.locator("#tip code").first).to_contain_text(spot["request"][-6:])
    page.mouse.click(box["x"] + spot["x"], box["y"] + spot["y"])
    expect(page.locator("#trace-one h2")).to_have_text(spot["request"], timeout=60_000)
    expect(page.locator("#trace-one .wf-row").first).to_be_visible()


def test_the_keyboard_reaches_every_view_and_a_trace_from_the_map(seen: Seen) -> None:
    page = seen.page
    for key, view in (("2", "cluster"), ("3", "traces"), ("4", "try"), ("1", "map")):
        page.keyboard.press(key)
        expect(page.locator(f"#view-{view}")).to_be_visible()
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.locator("#spacetime").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#tip")).to_be_visible()
    expect(page.locator("#map-said")).to_contain_text("decode-1")
    span = page.evaluate("tandemMap.span")
    page.keyboard.press("+")
    assert page.evaluate("tandemMap.span") < span
    page.locator("h1").first.click()
    page.keyboard.press(" ")
    expect(page.locator("#map-follow")).to_have_text("Held")
    page.keyboard.press("/")
    expect(page.locator("#trace-search")).to_be_focused()


def test_the_cluster_view_says_what_the_api_says(seen: Seen, cluster: Cluster) -> None:
    page = seen.view("cluster")
    model = api(cluster, "/api/cluster")["models"][0]
    card = page.locator("#model-0")
    expect(card).to_contain_text(MODEL)
    expect(card).to_contain_text(str(model["epoch"]))
    expect(card).to_contain_text(model["leader"])
    shown = {row.split("\t")[0]: row for row in card.locator("tbody tr").all_inner_texts()}
    for worker in model["workers"]:
        assert worker["role"] in shown[worker["id"]] and worker["address"] in shown[worker["id"]]
    assert set(shown) >= WORKERS
    expect(card).to_contain_text("interactive")  # a class, in the queue's table
    expect(page.locator("#in-flight tbody tr").first).to_be_visible()
    seen.picture("cluster")


def test_a_trace_is_found_explained_drawn_and_downloaded(seen: Seen, cluster: Cluster, tmp_path: Path) -> None:
    trace = ended(cluster)
    page = seen.view("traces")
    page.locator("#trace-search").fill(trace["request_id"])
    expect(page.locator("#trace-list tbody tr")).to_have_count(1)
    row = page.locator("#trace-list tbody tr")
    assert f"{trace['input_tokens']:,}" in row.inner_text() and trace["decode_worker"] in row.inner_text()
    row.click()
    one = page.locator("#trace-one")
    expect(one.locator(".words.went")).to_contain_text(trace["where_time_went"][0])
    expect(one.locator(".words:not(.went)")).to_contain_text(trace["placements"][0]["words"][0])
    expect(one.locator(".wf-row")).to_have_count(len(trace["tree"]))
    names = [text.split("\n")[0] for text in one.locator(".wf-name").all_inner_texts()]
    for name in ("route", "queue", "prefill", "kv_transfer", "decode"):
        assert any(name in shown for shown in names), names
    one.locator(".wf-row", has_text="decode").last.click()
    expect(one.locator(".wf-detail:visible")).to_contain_text("tandem.worker")
    with page.expect_download() as waiting:
        one.get_by_text("Chrome trace JSON").click()
    waiting.value.save_as(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(trace["tree"])
    seen.picture("trace")


def test_the_list_of_traces_can_be_narrowed(seen: Seen, cluster: Cluster) -> None:
    ended(cluster)
    page = seen.view("traces")
    expect(page.locator("#trace-list tbody tr").first).to_be_visible()
    page.locator("#trace-tenant").fill("nobody")
    expect(page.locator("#trace-list")).to_have_text("No trace matches.")
    page.locator("#trace-tenant").fill("default")
    expect(page.locator("#trace-list tbody tr").first).to_be_visible()
    page.locator("[data-only=failed]").click()
    expect(page.locator("#trace-list")).to_have_text("No trace matches.")


def test_a_question_is_answered_and_its_trace_drawn_underneath(seen: Seen) -> None:
    page = seen.view("try")
    page.locator("#try-prompt").fill("Say something.")
    page.locator("#try-max").fill("12")
    page.locator("#try-ask").click()
    expect(page.locator("#try-figures")).to_contain_text("12 new; first after")
    assert len(page.locator("#try-answer").inner_text().split()) == 12
    expect(page.locator("#try-trace .wf-bar.decode")).to_be_visible(timeout=30_000)
    expect(page.locator("#try-trace .words:not(.went)")).to_contain_text("tokens cached")
    seen.picture("try")


def test_the_panel_opened_by_its_own_address_knows_the_models(seen: Seen) -> None:
    page = seen.context.new_page()
    page.goto(f"{seen.url}#try")
    expect(page.locator("#try-model")).to_have_value(MODEL)
    page.close()


def test_what_the_figures_say_is_what_the_api_says(seen: Seen, cluster: Cluster) -> None:
    wait_for(lambda: api(cluster, "/api/cluster")["recent"]["requests_per_s"] > 0, 30, "requests counted")
    tiles = seen.page.locator("#figures")
    expect(tiles).to_contain_text("TTFT p50")
    shown = settled(
        seen.page,
        "[...document.querySelectorAll('#figures > div')].map(d => [...d.children].map(c => c.textContent))",
        lambda found: dict(found).get("Requests", "–")[0].isdigit(),
        "figures",
    )
    said = float(dict(shown)["Requests"].split("/s")[0])
    recent = api(cluster, "/api/cluster")["recent"]
    assert abs(said - recent["requests_per_s"]) <= max(1.0, 0.5 * recent["requests_per_s"])
    expect(seen.page.locator(".chart-plot canvas")).to_have_count(4)


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (820, "light"), (1280, "dark")])
def test_every_view_fits_its_screen_in_both_themes(
    browser: Browser, cluster: Cluster, load: None, width: int, scheme: str
) -> None:
    seen = Seen(browser, cluster.state()["console"], width, scheme)
    assert seen.page.evaluate("document.documentElement.dataset.theme") == scheme
    for name in EVERY_VIEW:
        page = seen.view(name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        seen.picture(f"{name}-{scheme}-{width}")
    seen.page.locator("#theme").click()
    assert seen.page.evaluate("document.documentElement.dataset.theme") != scheme
    nameless = (
        "[...document.querySelectorAll('button, a, input, select, textarea')].filter(n => !n.closest('[hidden]') && \
        !(n.textContent.trim() || n.getAttribute('aria-label') || n.labels?.length)).map(n => n.outerHTML)"
    )
    assert seen.page.evaluate(nameless) == []
    assert not seen.complaints
    seen.context.close()


def test_the_page_comes_back_by_itself_when_the_console_does(seen: Seen, cluster: Cluster) -> None:

    old = cluster.signal("console", signal.SIGKILL)
    expect(seen.page.locator("#link")).to_have_text("no connection")
    cluster.wait_restarted("console", old, 60)
    expect(seen.page.locator("#link")).to_have_text("live", timeout=60_000)
    settled(seen.page, "tandemMap.ordered.map(r => r.id)", lambda ids: set(ids) == WORKERS, "rows again")
    seen.complaints.clear()  # refused connections, while it was away


def test_the_simulators_page_draws_the_same_map(browser: Browser, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    sim_cli.add_arguments(parser)
    file = tmp_path / "run.html"
    argv = ["--requests", "60", "--fleet", "2P2D", "--rate", "20", "--quiet", "--html", str(file)]
    assert sim_cli.run(parser.parse_args(argv)) == 0
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    settled(page, "spaceTimeMap.ordered.map(r => r.id)", lambda ids: ids == ["p0", "p1", "d0", "d1"], "rows")
    kinds = """() => { const seen = new Set(); for (const row of spaceTimeMap.ordered)
        for (const s of [row.engine, row.transfers]) for (let i = 0; i < s.n; i++) seen.add(s.kind[i]);
        return [...seen]; }"""
    assert {0, 2, 3} <= set(page.evaluate(kinds))
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 300, box["y"] + 30)
    expect(page.locator("#tip")).to_contain_text("p0, prefill")
    before = page.evaluate("spaceTimeMap.span")
    page.locator("#in").click()
    assert page.evaluate("spaceTimeMap.span") == before / 2
    expect(page.locator("#tables")).to_contain_text("TTFT")
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES, "simulator.png")))
    page.close()
    assert not complaints
