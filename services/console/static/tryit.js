// One question to the cluster; the answer as it comes, and underneath the trace of it.

import { $, get, h, replace, time, whole } from "./dom.js";
import { on } from "./live.js";
import { drawn } from "./waterfall.js";

let models = [], built = false, controller = null;

export function start() { on("snapshot", data => { models = data.models; if (built) options(); }); }
/** The feed's snapshot may come after the panel is opened. */
function options() {
  const select = $("try-model"), chosen = select.value;
  replace(select, models.map(m => h("option", {}, m)));
  if (models.includes(chosen)) select.value = chosen;
}
export function shown() {
  if (built) return;
  built = true;
  replace($("view-try"), h("form.card.try", { onsubmit: event => { event.preventDefault(); ask(); } },
    h("div.card-head", {}, h("h1", {}, "Try it")),
    h("label", {}, h("span.visually-hidden", {}, "Question"), h("textarea", { id: "try-prompt", required: true, onkeydown: event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(); } }, "Why do the sea and the sky look blue?")),
    h("div.row", {}, h("label.quiet", {}, "model ", h("select", { id: "try-model" })), h("label.quiet", {}, "tokens at most ", h("input", { type: "number", id: "try-max", min: 1, max: 8000, value: 128 })),
      h("label.quiet", {}, "API key ", h("input", { type: "password", id: "try-key", autocomplete: "off", size: 18, placeholder: "if tenants have them" })),
      h("button.primary", { id: "try-ask" }, "Ask"), h("button", { type: "button", id: "try-stop", disabled: true, onclick: () => controller?.abort() }, "Stop"), h("span.dim", { id: "try-figures", role: "status" })),
    h("div.answer", { id: "try-answer" })), h("div.card", { id: "try-trace", hidden: true }));
  options();
}

async function ask() {
  if (!$("try-prompt").value.trim() || $("try-ask").disabled) return;
  const answer = $("try-answer"), began = performance.now();
  let first = null, traceId = "";
  controller = new AbortController();
  $("try-ask").disabled = true; $("try-stop").disabled = false; $("try-trace").hidden = true;
  replace(answer); replace($("try-figures"), "asked");
  const body = JSON.stringify({ model: $("try-model").value, prompt: $("try-prompt").value, max_tokens: +$("try-max").value || 128, api_key: $("try-key").value });
  try {
    const response = await fetch("/api/try", { method: "POST", body, headers: { "content-type": "application/json" }, signal: controller.signal });
    if (!response.ok) throw new Error((await response.json()).error?.message ?? String(response.status));
    for await (const [kind, data] of events(response.body)) {
      if (kind === "trace") traceId = data.trace_id;
      if (kind === "text") {
        if (first === null) { first = performance.now() - began; replace($("try-figures"), `first token after ${time(first / 1000)}`); }
        if (data.reasoning) answer.append(h("span.thought", {}, data.reasoning));
        if (data.text) answer.append(data.text);
      }
      if (kind === "failure") throw new Error(`${data.message} [${data.code}]`);
      if (kind === "end") {
        const rest = (performance.now() - began - first) / 1000, per = data.completion_tokens > 1 ? rest / (data.completion_tokens - 1) : null;
        replace($("try-figures"), `${whole.format(data.prompt_tokens)} prompt tokens, ${whole.format(data.cached_tokens)} cached; ${whole.format(data.completion_tokens)} new; first after ${time(first / 1000)}` + (per ? `, then ${time(per)} each` : ""));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") replace($("try-figures"), "stopped");
    else { replace($("try-figures")); answer.append(h("p.fail", {}, error.message)); }
  }
  $("try-ask").disabled = false; $("try-stop").disabled = true;
  if (traceId) await trace(traceId);
}

/** Its spans come from several processes within a second or so: drawn until nothing is added. */
async function trace(id) {
  const host = $("try-trace");
  let spans = -1;
  for (let attempt = 0; attempt < 12; attempt++) {
    await new Promise(done => setTimeout(done, 400));
    const found = await get(`/api/traces/${id}`).catch(() => null);
    if (!found) continue;
    if (found.spans === spans && found.request_id) return;
    spans = found.spans;
    host.hidden = false; replace(host, drawn(found));
  }
  if (spans < 0) { host.hidden = false; replace(host, h("p.dim", {}, "Its trace did not arrive. What is refused before it is a request has none.")); }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n"), kind = lines.find(l => l.startsWith("event: "))?.slice(7), data = lines.find(l => l.startsWith("data: "))?.slice(6);
      if (kind && data) yield [kind, JSON.parse(data)];
    }
  }
}
