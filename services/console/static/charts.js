// Figures of the last minute, and four small charts of the last five, from /api/series once in a while.

/* global uPlot */
import { $, h, replace, get, percent, rate, time, whole } from "./dom.js";
import { on } from "./live.js";

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const CHARTS = [
  { title: "Time to first token", unit: "s", series: [["p50", "ttft_p50_s", "--decode", []], ["p99", "ttft_p99_s", "--prefill", [6, 3]]] },
  { title: "Time between tokens", unit: "s", series: [["p50", "itl_p50_s", "--decode", []], ["p99", "itl_p99_s", "--prefill", [6, 3]]] },
  { title: "Requests a second", unit: "/s", series: [["ended", "requests_per_s", "--dim", []], ["within their SLO", "goodput_per_s", "--transfer", []], ["failed", "failed_per_s", "--fail", [3, 3]]] },
  { title: "Prefix hit rate", unit: "%", series: [["of prompt tokens", "hit_rate", "--mixed", []]] },
];
let plots = [];

export function start() {
  on("status", figures);
  make();
  addEventListener("themechange", make);
  new ResizeObserver(() => { for (const p of plots) p.plot.setSize({ width: p.host.clientWidth, height: 150 }); }).observe($("charts"));
  setInterval(refresh, 2500);
  refresh();
}

function figures(status) {
  const r = status.recent, queue = status.models.reduce((sum, m) => sum + m.queue.requests, 0);
  const oldest = Math.max(0, ...status.models.map(m => m.queue.oldest_wait_s));
  const tiles = [
    ["TTFT p50", time(r.ttft_p50_s), `p99 ${time(r.ttft_p99_s)}`], ["Between tokens p50", time(r.itl_p50_s), `p99 ${time(r.itl_p99_s)}`],
    ["Requests", `${rate(r.requests_per_s)}/s`, `${rate(r.output_tokens_per_s)} tokens/s`],
    ["Goodput", `${rate(r.goodput_per_s)}/s`, `${percent(r.attainment)} of offered`], ["Prefix hits", percent(r.hit_rate), "of prompt tokens"],
    ["In flight", whole.format(status.in_flight), "on workers"], ["Waiting", whole.format(queue), queue ? `oldest ${time(oldest)}` : "in the router"],
  ];
  replace($("figures"), tiles.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, more)))));
}

function make() {
  for (const { plot } of plots) plot.destroy();
  replace($("charts"));
  plots = CHARTS.map(chart => {
    const host = h("div.chart-plot"), empty = h("div.empty", {}, "no request has ended yet");
    $("charts").append(h("div.card.chart", {}, h("h2", {}, chart.title, h("span.quiet", {}, "  last 5 min")), host));
    const grid = { stroke: css("--line"), width: 1 }, axis = { stroke: css("--dim"), grid, ticks: grid, font: "11px system-ui", size: 60 };
    const value = v => v === null || v === undefined ? "–" : chart.unit === "s" ? time(v) : chart.unit === "%" ? percent(v) : `${rate(v)}/s`;
    const plot = new uPlot({
      width: host.clientWidth || 320, height: 150, cursor: { y: false, points: { size: 6 } }, legend: { live: true },
      scales: { x: { time: false }, y: { range: (u, low, high) => [0, chart.unit === "%" ? 1 : Math.max(high * 1.1, 1e-3)] } },
      axes: [{ ...axis, size: 26, values: (u, ticks) => ticks.map(t => t === 0 ? "now" : `${t / 60} min`), splits: () => [-300, -240, -180, -120, -60, 0] },
        { ...axis, values: (u, ticks) => ticks.map(value) }],
      series: [{ label: "", value: (u, v) => v === null ? "" : `${Math.round(-v)} s ago` },
        ...chart.series.map(([label, , colour, dash]) => ({ label, stroke: css(colour), width: 2, dash, spanGaps: false, value: (u, v) => value(v), points: { show: (u, i, a, b) => b - a < 3 } }))],
    }, [[-300, 0], ...chart.series.map(() => [null, null])], host);
    host.append(empty);
    return { plot, host, empty, chart };
  });
  refresh();
}

async function refresh() {
  if (document.hidden || $("view-map").hidden) return;
  const { columns } = await get("/api/series?span_s=300&step_s=5").catch(() => ({}));
  if (!columns) return;
  for (const { plot, empty, chart } of plots) {
    const data = chart.series.map(([, name]) => columns[name]);
    empty.hidden = data.some(column => column.some(v => v !== null && v !== undefined));
    plot.setData([columns.t, ...data]);
    // Nobody points at it: the legend says the newest.
    const newest = columns.t.findLastIndex((_, i) => data.some(column => column[i] !== null && column[i] !== undefined));
    if (newest >= 0 && (plot.cursor.left ?? -1) < 0) plot.setLegend({ idx: newest });
  }
}
