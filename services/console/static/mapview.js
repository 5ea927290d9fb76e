// The map on its page: fed by the live feed, with its controls, what is said under the pointer, and the way to traces.

import { SpaceTimeMap, KINDS } from "./map.js";
import { $, h, replace, percent, shortId, time } from "./dom.js";
import { cost, on } from "./live.js";

let map = null, snapshot = null, openTrace = () => {}, reportRuns = 0;

export function start(onTrace) {
  openTrace = onTrace;
  map = new SpaceTimeMap($("spacetime"), { live: true, onPick: pick, onHover: hover, onView: controls });
  on("snapshot", data => {
    snapshot = data;
    map.clear(); map.clock = null; map.setNow(data.now); map.setRows(data.rows);
    take(data);
    for (const [at, requests] of data.queue) map.setQueue(at, requests);
  });
  on("batch", data => { map.setNow(data.now); map.setRows(data.rows); take(data); map.forgetGone(data.now - 120000); });
  on("status", data => {
    reportRuns = data.runs_per_report;
    map.setQueue(data.at, data.models.reduce((sum, model) => sum + model.queue.requests, 0));
    note();
  });
  $("map-follow").addEventListener("click", () => map.follow(!map.following));
  $("map-span").addEventListener("change", event => map.setSpan(+event.target.value));
  $("map-short").addEventListener("click", () => map.setRowHeight(map.rowCss / 1.4));
  $("map-tall").addEventListener("click", () => map.setRowHeight(map.rowCss * 1.4));
  $("map-fit").addEventListener("click", () => map.setRowHeight(0));
  addEventListener("themechange", () => map.theme());
  new ResizeObserver(() => map.resize()).observe($("spacetime").parentElement);
  addEventListener("resize", () => map.resize());
  requestAnimationFrame(frame);
  // For whoever measures it.
  window.tandemMap = map;
  window.tandemCost = { now: () => ({ batches: cost.batches, batchTotal: cost.total }), reset: () => { cost.batches = cost.total = 0; } };
}
export const shown = () => map.resize();
export const hold = () => map.follow(!map.following);

function take(data) {
  // In order: what opened in this batch may have closed in it.
  for (const load of data.loads) map.setLoad(load, data.now);
  for (const opened of data.opened) {
    const row = map.rows.get(opened[0]), before = row?.open.get(opened[1]);
    if (before) {  // its end is in this batch, too
      const i = data.closed.findIndex(c => c[0] === opened[0] && c[1] === opened[1]);
      if (i >= 0) map.close(data.closed.splice(i, 1)[0]);
    }
    map.open(opened);
  }
  for (const closed of data.closed) map.close(closed);
  map.addSpans(data.spans);
}

function frame() {
  if (!document.hidden && !$("view-map").hidden) map.frame();
  requestAnimationFrame(frame);
}

function controls() {
  const follow = $("map-follow");
  follow.setAttribute("aria-pressed", String(map.following));
  follow.textContent = map.following ? "Live" : "Held";
  const select = $("map-span"), found = [...select.options].find(option => +option.value === Math.round(map.span));
  select.querySelector(".other")?.remove();
  if (found) select.value = found.value;
  else select.append(h("option.other", { value: map.span, selected: true }, time(map.span / 1000)));
  note();
}

function note() {
  const recent = [...map.timing.recent].sort((a, b) => a - b), of = share => recent[Math.floor(share * (recent.length - 1))] ?? 0;
  const joined = reportRuns ? `a worker's report of 100 ms gives at most ${reportRuns} spans` : "";
  replace($("map-note"), [...map.decimation(), joined, `script per frame ${of(.5).toFixed(1)} ms (p95 ${of(.95).toFixed(1)})`,
    `per batch ${(cost.total / Math.max(1, cost.batches)).toFixed(1)} ms`].filter(Boolean).join(" · "));
}

function hover(info, where) {
  const tip = $("tip");
  tip.hidden = !info;
  if (!info) return;
  replace(tip, words(info));
  if (where) {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(where.x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (where.y + 18 + box.height > innerHeight ? where.y - box.height - 10 : where.y + 18) + "px";
  }
  if (document.activeElement === $("spacetime")) $("map-said").textContent = tip.textContent;
}

function words(info) {
  const { row } = info, ago = info.ago / 1000;
  const did = KINDS.slice(0, 3).map((kind, i) => info.shares[i] > .004 ? `${kind === "mixed" ? "prefill beside decode" : kind} ${percent(Math.min(1, info.shares[i]))}` : "").filter(Boolean);
  const batch = info.level >= .5 ? `, ${info.level.toFixed(0)} sequence${info.level >= 1.5 ? "s" : ""}` : "";
  const lines = [h("div", {}, h("b", {}, row.id), h("span.dim", {}, ` ${row.role}, ${ago < .05 ? "now" : `${ago.toFixed(ago < 10 ? 1 : 0)} s ago`}`))];
  lines.push(h("p", {}, did.length ? did.join(", ") + batch : idleWords(info)));
  if (did.length && info.busy < .98) lines.push(h("p.dim", {}, `${percent(1 - info.busy)} idle${info.queued ? " while requests wait" : ""}`));
  if (info.shares[3] > 0) lines.push(h("p", {}, "KV arriving"));
  const requests = info.requests.slice(0, 5);
  for (const s of requests) lines.push(h("p", {}, h("code", {}, shortId(s.request)), h("span.dim", {}, ` ${KINDS[s.kind]} ${time((Math.min(s.end, map.now()) - s.begin) / 1000)}${s.end === Infinity ? " so far" : ""}`)));
  if (info.requests.length > requests.length) lines.push(h("p.dim", {}, `and ${info.requests.length - requests.length} more`));
  if (info.requests.length) lines.push(h("p.dim", {}, info.requests.length === 1 ? "click: its trace" : "click: choose one"));
  return lines;
}

/** Why a worker does nothing, as far as its report and the queue tell. */
function idleWords(info) {
  const load = info.row.load;
  if (info.state >= 3) return "silent: no report, so nothing is known";
  if (info.state === 2) return "idle: draining, it gets no new work";
  if (load && load[2] + load[3] > 0 && info.ago < 1000) return "in a step that has not ended";
  if (!info.queued) return "idle: nothing waits in the router";
  if (load && load[5] > .9) return `idle while requests wait: its KV is ${percent(load[5])} taken`;
  return info.row.role === "prefill" ? "idle while requests wait: they wait for a decode worker's room, or prefill there" : "idle while requests wait: they wait for another model, for credit or for room";
}

function pick(info) {
  const requests = [...new Map(info.requests.map(s => [s.request, s])).values()];
  const open = request => { $("choice").close(); openTrace(request.split("#")[0]); };
  if (requests.length === 1) return open(requests[0].request);
  replace($("choice"), h("h2", {}, `On ${info.row.id}`),
    h("ul", {}, requests.map(s => h("li", {}, h("button.link", { type: "button", onclick: () => open(s.request) }, s.request), h("span.dim", {}, ` ${KINDS[s.kind]}`)))),
    h("button", { type: "button", onclick: () => $("choice").close() }, "Close"));
  $("choice").showModal();
}
