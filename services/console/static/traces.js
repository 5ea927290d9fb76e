// The list of recent traces with search, and one of them.

import { $, ago, get, h, replace, shortId, time, whole } from "./dom.js";
import { drawn } from "./waterfall.js";

const query = { q: "", tenant: "", only: "" };
let chosen = "", timer = null, built = false, asked = 0, showing = 0;

export function start() { setInterval(() => { if (!$("view-traces").hidden && !document.hidden && !$("trace-hold")?.checked) list(); }, 2000); }
export function shown(wanted) {
  if (!built) build();
  list();
  if (wanted) show(wanted);
}
export function search() { $("trace-search")?.focus(); }

function build() {
  built = true;
  const only = ["", "slow", "failed", "slowest"].map(value => h("button", { type: "button", "data-only": value, "aria-pressed": String(query.only === value), onclick: event => {
    query.only = value;
    for (const b of event.target.parentElement.children) b.setAttribute("aria-pressed", String(b.dataset.only === value));
    list();
  }, title: value === "slowest" ? "of the last minute, the latest first token first" : "" }, value || "all"));
  const typed = name => event => { query[name] = event.target.value.trim(); clearTimeout(timer); timer = setTimeout(list, 200); };
  replace($("view-traces"), h("div.card", { id: "trace-one", hidden: true, tabindex: -1 }), h("div.card", {},
    h("div.card-head", {}, h("h1", {}, "Traces"), h("form.search", { role: "search", onsubmit: event => { event.preventDefault(); open(); } },
      h("input", { type: "search", id: "trace-search", placeholder: "request or trace id, model   ( / )", "aria-label": "Search by request id, trace id or model", oninput: typed("q") }),
      h("input", { type: "text", id: "trace-tenant", placeholder: "tenant", "aria-label": "Tenant", size: 12, oninput: typed("tenant") }),
      h("span.segmented", { role: "group", "aria-label": "Which" }, only), h("label.quiet", {}, h("input", { type: "checkbox", id: "trace-hold" }), " hold"))),
    h("div.scroll", { id: "trace-list" }), h("p.note", { id: "trace-note" })));
  const open = () => { const first = $("trace-list").querySelector("tr.pick"); if (first) first.click(); };
}

async function list() {
  const turn = ++asked;
  let data;
  try { data = await get(`/api/traces?${new URLSearchParams({ ...query, limit: 100 })}`); } catch (error) { replace($("trace-note"), error.message); return; }
  if (turn !== asked) return;
  const columns = ["request", "when", "tenant", "class", "prompt", "cached", "answer", "waited", "first token", "whole", "decode on", ""];
  const numeric = new Set([4, 5, 6, 7, 8, 9]);
  const focused = document.activeElement?.dataset?.trace;
  replace($("trace-list"), data.traces.length ? h("table", {}, h("thead", {}, h("tr", {}, columns.map((name, i) => h(numeric.has(i) ? "th.n" : "th", { scope: "col" }, name)))),
    h("tbody", {}, data.traces.map(t => h("tr.pick", { "aria-selected": String(t.trace_id === chosen), onclick: () => { location.hash = `#traces/${t.trace_id}`; } },
      h("td", {}, h("button.link.mono", { type: "button", "data-trace": t.trace_id, title: t.request_id }, shortId(t.request_id))), h("td", {}, ago(t.start_unix_ms)), h("td", {}, t.tenant), h("td", {}, t.class),
      h("td.n", {}, whole.format(t.input_tokens)), h("td.n", {}, whole.format(t.cached_tokens)), h("td.n", {}, whole.format(t.output_tokens)), h("td.n", {}, time(t.queue_s)), h("td.n", {}, time(t.ttft_s)), h("td.n", {}, t.ended ? time(t.duration_s) : "…"),
      h("td", {}, t.decode_worker), h("td", {}, t.error ? h("span.tag.fail", {}, `✕ ${t.error}`) : t.slow ? h("span.tag.slow", {}, "slow") : !t.ended ? h("span.tag", {}, "running") : t.attempts > 1 ? h("span.tag", {}, `${t.attempts} attempts`) : ""))))) : h("p.dim", {}, data.kept ? "No trace matches." : "No trace has arrived yet."));
  if (focused) $("trace-list").querySelector(`[data-trace="${focused}"]`)?.focus();
  replace($("trace-note"), `${data.traces.length} shown, ${whole.format(data.kept)} kept, ${whole.format(data.spans_received)} spans received. Slow and failed ones are kept longer; slow = the first token later than that of 95 % of its contemporaries, or than its SLO.`);
}

async function show(wanted) {
  const host = $("trace-one"), turn = ++showing;
  host.hidden = false;
  replace(host, h("p.dim", {}, "…"));
  for (let attempt = 0; attempt < 30 && turn === showing; attempt++) {
    try {
      const trace = await get(`/api/traces/${encodeURIComponent(wanted)}`);
      if (turn !== showing) return;
      chosen = trace.trace_id;
      for (const row of $("trace-list").querySelectorAll("tr.pick")) row.setAttribute("aria-selected", String(row.querySelector("[data-trace]")?.dataset.trace === chosen));
      replace(host, drawn(trace));
      host.focus({ preventScroll: true }); host.scrollIntoView({ block: "nearest" });
      // The last spans of a request that has just ended are still on their way.
      if (attempt < 2 && Date.now() - trace.start_unix_ms - 1000 * trace.duration_s < 2500) { await new Promise(done => setTimeout(done, 900)); continue; }
      return;
    } catch (error) {
      replace(host, h("p.fail", {}, `${wanted}: ${error.message}.`), h("p.dim", {}, "A trace comes when its request has ended; of many requests a share is traced (TANDEM_TRACE_RATIO, TANDEM_TRACE_PER_S). Trying again…"));
      await new Promise(done => setTimeout(done, 1000));
    }
  }
}
