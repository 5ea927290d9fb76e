// One trace: where its time went and its placement in words, and its spans as a waterfall.

import { h, percent, time, whole, bytes } from "./dom.js";

const OURS = new Set(["prefill", "decode", "kv_transfer", "queue"]);
const BAD = new Set(["attempt_failed", "cancelled", "prefill_instead", "exception"]);

/** A node with all of it. `trace` is what /api/traces/ID gives. */
export function drawn(trace) {
  const went = trace.where_time_went.length > 0 && h("div.words.went", {}, trace.where_time_went.map(text => h("p", {}, text)));
  return h("div.trace", {}, head(trace), went, ...trace.placements.map((p, i) => placement(p, i, trace.placements.length)), waterfall(trace));
}

function head(t) {
  const facts = [
    ["first token", time(t.ttft_s)], ["whole", time(t.duration_s)], ["per token", time(t.tpot_s)],
    ["prompt", `${whole.format(t.input_tokens)} tokens, ${whole.format(t.cached_tokens)} cached`], ["answer", `${whole.format(t.output_tokens)} tokens`],
    ["waited", time(t.queue_s)], ["tenant", t.tenant || "–"], ["class", t.class || "–"], t.attempts > 1 && ["attempts", String(t.attempts)],
    t.prefill_worker && ["prefill", t.prefill_worker], t.decode_worker && ["decode", t.decode_worker],
  ].filter(Boolean);
  return h("div", {}, h("div.card-head", {}, h("h2.mono", {}, t.request_id || t.trace_id), t.error && h("span.tag.fail", {}, `✕ ${t.error}`), t.slow && h("span.tag.slow", {}, "slow"),
    t.slo_met === false && h("span.tag.fail", {}, "SLO missed"),
    h("div.controls", {}, h("a", { href: `/api/traces/${t.trace_id}/chrome.json`, download: `tandem-${t.trace_id}.json`, title: "Opens in Perfetto (ui.perfetto.dev) and in chrome://tracing" }, "Chrome trace JSON"))),
    h("dl.facts", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    h("p.note", {}, `trace ${t.trace_id}, ${t.name}`, t.why && t.why !== "sampled" ? `; kept because it was ${t.why}` : "", t.dropped_spans ? `; ${t.dropped_spans} spans beyond 512 are left out` : ""));
}

const TERMS = { ttft_ms: ["first token", "ms"], waited_ms: ["waited", "ms"], prefill_ms: ["prefill", "ms"], transfer_ms: ["transfer", "ms"], itl_ms: ["per token", "ms"], kv_share: ["KV", "%"], ttft_of_target: ["of TTFT target", "%"], itl_of_target: ["of ITL target", "%"], effort_ms: ["effort", "ms"] };
function placement(p, index, count) {
  const terms = Object.keys(TERMS).filter(term => p.candidates.some(c => c.terms[term] !== undefined));
  const cell = (c, term) => { const v = c.terms[term]; return v === undefined ? "–" : TERMS[term][1] === "%" ? percent(v) : time(v / 1000); };
  return h("div", {}, h("div.words", {}, count > 1 && h("p", {}, `Attempt ${p.attempt + 1}:`), p.words.map(text => h("p", {}, text)), !p.words.length && h("p", {}, "Its placement is not explained.")),
    p.candidates.length > 0 && h("details", {}, h("summary", {}, `${p.candidates.length} candidates, every term`), h("div.scroll", {}, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "plan"), h("th.n", { scope: "col" }, "score"), h("th.n", { scope: "col" }, "cached"), terms.map(term => h("th.n", { scope: "col" }, TERMS[term][0])))),
      h("tbody", {}, p.candidates.map(c => h("tr", {}, h("td", {}, c.chosen ? h("strong", {}, `✓ ${c.where}`) : c.where), h("td.n", {}, c.score === null ? "–" : c.score.toPrecision(4)), h("td.n", {}, whole.format(c.cached_tokens)), terms.map(term => h("td.n", {}, cell(c, term))))))))));
}

function waterfall(trace) {
  const end = Math.max(0.001, ...trace.tree.map(s => Math.max(s.end_ms, ...s.events.map(e => e.at_ms))));
  const root = h("div.waterfall", { role: "group", "aria-label": "Waterfall" });
  root.append(h("div.wf-axis", {}, h("span"), h("div.wf-ticks", {}, [0, .25, .5, .75, 1].map(k => h("span", { css: { left: `${100 * k}%` } }, time(k * end / 1000))))));
  for (const span of trace.tree) root.append(...row(span, end));
  return root;
}

function row(span, end) {
  const left = 100 * Math.max(0, span.begin_ms) / end, width = Math.max(.1, 100 * (span.end_ms - span.begin_ms) / end);
  const kind = OURS.has(span.name) ? span.name : span.depth === 0 ? "request" : "other";
  const worker = span.attributes["tandem.worker"] || span.attributes["tandem.router"] || span.instance;
  const where = left + width < 80 ? [`${left + width}%`, ""] : left > 20 ? [`${left}%`, ".before"] : [`${left}%`, ".inside"];
  const took = time((span.end_ms - span.begin_ms) / 1000) + extra(span);
  const detail = h("div.wf-detail", { hidden: true });
  const button = h("button.wf-row", { type: "button", "aria-expanded": "false", onclick: () => {
    detail.hidden = !detail.hidden; button.setAttribute("aria-expanded", String(!detail.hidden));
    if (!detail.childNodes.length) detail.append(attributes(span));
  } }, h("span.wf-name", { css: { "--depth": span.depth } }, span.error ? "✕ " : "", span.name, h("small", {}, worker)),
  h("span.wf-track", {}, h(`span.wf-bar.${kind}${span.error ? ".failed" : ""}`, { css: { left: `${left}%`, width: `${width}%` } }),
    span.events.map(e => h(`span.wf-event${BAD.has(e.name) ? ".bad" : ""}`, { title: `${e.name}, ${time(e.at_ms / 1000)}`, css: { left: `${100 * e.at_ms / end}%` } })),
    h(`span.wf-time${where[1]}`, { css: { left: where[0] } }, took)));
  return [button, detail];
}

/** The one thing about a span that its length does not say. */
function extra(span) {
  const a = span.attributes, n = name => a[name];
  if (span.name === "queue" && n("tandem.queue.reason") && n("tandem.queue.reason") !== "none") return `, for ${n("tandem.queue.reason").replaceAll("_", " ")}`;
  if (span.name === "prefill" && n("tandem.computed_tokens") !== undefined) return `, ${whole.format(n("tandem.computed_tokens"))} tokens computed`;
  if (span.name === "kv_transfer" && n("tandem.kv.bytes")) return `, ${bytes(n("tandem.kv.bytes"))}`;
  if (span.name === "decode" && n("gen_ai.usage.output_tokens") !== undefined) return `, ${whole.format(n("gen_ai.usage.output_tokens"))} tokens` + (n("tandem.itl_p50_ms") ? `, ${time(n("tandem.itl_p50_ms") / 1000)} each` : "");
  return span.error ? `, ${span.error}` : "";
}

function attributes(span) {
  const text = v => Array.isArray(v) ? v.map(text).join(", ") : typeof v === "number" && !Number.isInteger(v) ? String(+v.toPrecision(6)) : String(v);
  const rows = [["service", `${span.service} ${span.instance}`], ["from, to", `${span.begin_ms.toFixed(2)} ms, ${span.end_ms.toFixed(2)} ms`], ["span", span.id], span.error && ["error", span.error],
    ...Object.entries(span.attributes).map(([k, v]) => [k, text(v)]),
    ...span.events.map(e => [`${e.name} at ${e.at_ms.toFixed(2)} ms`, Object.entries(e.attributes).map(([k, v]) => `${k.replace("tandem.", "")} ${text(v)}`).join(", ")])].filter(Boolean);
  return h("table", {}, h("tbody", {}, rows.map(([k, v]) => h("tr", {}, h("td", {}, k), h("td", {}, v)))));
}
