// Topology with live load: leaders, workers, what waits by class and tenant, and requests in flight.

import { $, h, replace, get, percent, time, whole } from "./dom.js";
import { on } from "./live.js";

let openTrace = () => {}, latest = null, drawn = "";

export function start(onTrace) {
  openTrace = onTrace;
  on("status", status => { latest = status; if (!$("view-cluster").hidden) draw(); });
  setInterval(() => { if (!$("view-cluster").hidden && !document.hidden) requests(); }, 1000);
}
export function shown() { drawn = ""; if (latest) draw(); requests(); }

function draw() {
  const models = latest.models, key = models.map(m => m.model).join("\n") + latest.routers.length;
  if (key !== drawn) {
    drawn = key;
    replace($("view-cluster"), models.map((m, i) => h("div.card", { id: `model-${i}` })), h("div.card", { id: "in-flight" }, h("h2", {}, "In flight")));
  }
  models.forEach((model, i) => replace($(`model-${i}`), modelCard(model)));
}

function modelCard(model) {
  const q = model.queue, silent = latest.routers.filter(r => !r.answers);
  return [
    h("div.card-head", {}, h("h1", {}, model.model), h("dl.facts", {},
      fact("leader", model.leader || h("span.fail", {}, "none")), fact("epoch", String(model.epoch)),
      fact("routers", `${latest.routers.length - silent.length} of ${latest.routers.length} answer`),
      fact("in flight", whole.format(model.in_flight)), fact("waiting", `${whole.format(q.requests)} requests, ${whole.format(q.tokens)} tokens`),
      fact("oldest wait", time(q.oldest_wait_s)), model.age_s > 5 && fact("as of", h("span.fail", {}, `${model.age_s.toFixed(0)} s ago`)))),
    h("div.scroll", {}, workers(model.workers)),
    h("div.two", { css: { "margin-block-start": "1rem" } }, depth("Waiting by class", q.by_class), depth("Waiting by tenant", q.by_tenant)),
    h("details", {}, h("summary", {}, "Policy"), h("code", {}, Object.entries(model.policy).map(([k, v]) => `${k} ${JSON.stringify(v)}`).join(" · "))),
  ];
}
const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function workers(list) {
  const head = ["worker", "role", "state", "running", "waiting", "prefill pending", "KV", "booked", "prefill booked", "handoffs", "engine", "address"];
  const numeric = new Set([3, 4, 5, 7, 8, 9]);
  return h("table", {}, h("caption.visually-hidden", {}, "Workers"), h("thead", {}, h("tr", {}, head.map((name, i) => h(numeric.has(i) ? "th.n" : "th", { scope: "col" }, name)))),
    h("tbody", {}, [...list].sort(byRole).map(w => h("tr", {}, h("td", {}, w.id), h("td", {}, h(`span.role.${w.role}`, {}, w.role)),
      h("td", {}, w.state === "alive" ? h("span.good", {}, "alive") : h("span.tag.fail", {}, w.state)),
      n(w.running), n(w.waiting), n(w.pending_prefill_tokens, " tok"), h("td", {}, meter(w.kv_blocks_used, w.kv_blocks_total, w.role)),
      n(w.booked_requests), h("td.n", {}, time(w.booked_prefill_s)), n(w.handoffs), h("td", {}, `${w.engine} ${w.engine_version}`), h("td.dim", {}, w.address)))));
}
const byRole = (a, b) => b.role.localeCompare(a.role) || a.id.localeCompare(b.id, undefined, { numeric: true });
const n = (value, unit = "") => h("td.n", {}, whole.format(value) + (value ? unit : ""));
function meter(used, total, role) {
  const share = total ? used / total : 0;
  return h("span", { title: `${whole.format(used)} of ${whole.format(total)} blocks` },
    h(`span.meter.${role}${share > .9 ? ".high" : ""}`, {}, h("i", { css: { "inline-size": `${(100 * share).toFixed(1)}%` } })), ` ${percent(share)}`);
}
function depth(title, list) {
  const most = Math.max(1, ...list.map(d => d.tokens));
  return h("div", {}, h("h3", {}, title), list.length ? h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "name"), h("th.n", { scope: "col" }, "requests"), h("th.n", { scope: "col" }, "tokens"), h("th", { scope: "col" }, ""))),
    h("tbody", {}, list.map(d => h("tr", {}, h("td", {}, d.name), n(d.requests), n(d.tokens), h("td", {}, h("span.meter.prefill", {}, h("i", { css: { "inline-size": `${100 * d.tokens / most}%` } }))))))) : h("p.dim", {}, "nothing waits"));
}

async function requests() {
  const host = $("in-flight");
  if (!host) return;
  const { requests: list } = await get("/api/requests").catch(() => ({ requests: [] }));
  const shown = list.slice(0, 50);
  replace(host, h("div.card-head", {}, h("h2", {}, "In flight on workers"), h("span.dim", {}, list.length ? `${list.length}, the longest first` : "none")),
    shown.length && h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, ["request", "worker", "phase", "for"].map(name => h("th", { scope: "col" }, name)))),
      h("tbody", {}, shown.map(r => h("tr", {}, h("td", {}, h("button.link.mono", { type: "button", onclick: () => openTrace(r.request_id.split("#")[0]) }, r.request_id)), h("td", {}, r.worker), h("td", {}, r.phase), h("td", {}, time(r.for_s))))))));
}
