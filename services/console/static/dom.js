// Elements and figures. Text goes in as text, never as markup.

/** h("td.n", {title: "x"}, "text", node, ...); `onclick` and the like are listeners. */
export function h(what, attributes = {}, ...children) {
  const [name, ...classes] = what.split(".");
  const node = document.createElement(name || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "css") for (const [property, v] of Object.entries(value)) node.style.setProperty(property, v);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
export const $ = id => document.getElementById(id);

export const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
export function time(s) {
  if (s === null || s === undefined) return "–";
  const ms = s * 1000;
  if (ms === 0) return "0";
  if (ms < 1) return `${(ms * 1000).toFixed(0)} µs`;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  return s < 100 ? `${s.toFixed(s < 10 ? 2 : 1)} s` : `${whole.format(s)} s`;
}
export const percent = v => v === null || v === undefined ? "–" : `${(100 * v).toFixed(v >= .9995 || v === 0 ? 0 : 1)} %`;
export const rate = v => v === null || v === undefined ? "–" : v >= 100 ? whole.format(v) : v.toFixed(1);
export function bytes(n) {
  for (const unit of ["B", "KB", "MB", "GB"]) { if (n < 1000) return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`; n /= 1000; }
  return `${n.toFixed(1)} TB`;
}
export function ago(unixMs) {
  const s = Math.max(0, (Date.now() - unixMs) / 1000);
  return s < 60 ? `${Math.floor(s)} s ago` : s < 3600 ? `${Math.floor(s / 60)} min ago` : `${Math.floor(s / 3600)} h ago`;
}
export const shortId = id => id.length > 22 ? id.slice(0, 12) + "…" + id.slice(-6) : id;

/** GET, as JSON. Throws an Error whose message is the server's. */
export async function get(path) {
  const response = await fetch(path, { headers: { accept: "application/json" } });
  const data = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(data.error?.message ?? `${path}: ${response.status}`);
  return data;
}
export function replace(node, ...children) { node.replaceChildren(...children.flat().filter(Boolean)); }
