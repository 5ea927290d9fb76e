// The page: which view is shown, keys, and the state of the connection.

import * as charts from "./charts.js";
import * as cluster from "./cluster.js";
import * as mapview from "./mapview.js";
import * as traces from "./traces.js";
import * as tryit from "./tryit.js";
import { $ } from "./dom.js";
import { connect, on } from "./live.js";

const VIEWS = ["map", "cluster", "traces", "try"];
const openTrace = id => { location.hash = `#traces/${id}`; };

function route() {
  const [wanted, rest] = location.hash.slice(1).split("/");
  const view = VIEWS.includes(wanted) ? wanted : "map";
  for (const name of VIEWS) $(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) link.dataset.view === view ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  $("tip").hidden = true;
  if (view === "map") mapview.shown();
  if (view === "cluster") cluster.shown();
  if (view === "traces") traces.shown(rest ? decodeURIComponent(rest) : "");
  if (view === "try") tryit.shown();
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select, dialog")) return;
  const number = "1234".indexOf(event.key);
  if (event.key.length === 1 && number >= 0) location.hash = `#${VIEWS[number]}`;
  else if (event.key === "/") { event.preventDefault(); location.hash = "#traces"; setTimeout(traces.search, 30); }
  else if (event.key === "t") window.toggleTheme();
  else if (event.key === "?") $("help").showModal();
  else if (event.key === " " && !$("view-map").hidden && !event.target.closest?.("button, a")) { event.preventDefault(); mapview.hold(); }
}

let busAway = false, linked = false;
function pill() {
  const [text, state] = !linked ? ["no connection", "off"] : busAway ? ["bus away", "off"] : ["live", "on"];
  $("link").textContent = text; $("link").className = `pill ${state}`;
}
on("snapshot", data => { $("cluster-name").textContent = data.cluster; document.title = `Tandem console: ${data.cluster}`; });
on("link", up => { linked = up; pill(); });
on("status", status => { busAway = !status.bus; pill(); });

mapview.start(openTrace); charts.start(); cluster.start(openTrace); traces.start(); tryit.start();
$("theme").addEventListener("click", () => window.toggleTheme());
$("help-button").addEventListener("click", () => $("help").showModal());
addEventListener("keydown", key);
addEventListener("hashchange", route);
connect();
route();
