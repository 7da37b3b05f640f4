// The page: one view at a time, named by the part of the address after "#".
//   #/                       runs            #/run/ID/overview        panels
//   #/sweep/ID               runs of one sweep
//   #/run/ID/trajectories?env=..             #/run/ID/trajectory/12?token=40

import { el, fill, link } from "./dom.js";
import { runsView } from "./runs.js";
import { sweepView } from "./sweep.js";
import { overviewView } from "./overview.js";
import { trajectoriesView } from "./trajectories.js";
import { trajectoryView } from "./trajectory.js";
import { tokensView } from "./tokens.js";
import { lineageView } from "./lineage.js";
import { configView, eventsView, ledgerView, logsView, timelineView, workersView } from "./tables.js";

const VIEWS = { overview: overviewView, trajectories: trajectoriesView, lineage: lineageView, timeline: timelineView, workers: workersView,
  ledger: ledgerView, config: configView, logs: logsView, events: eventsView };
const DETAILS = { trajectory: trajectoryView, tokens: tokensView };
let current = null;

export function readHash() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  return { parts, query: Object.fromEntries(new URLSearchParams(query || "")) };
}

async function show() {
  if (current) current.abort();
  current = new AbortController();
  const { signal } = current;
  const view = document.getElementById("view");
  view.removeAttribute("data-ready");
  try {
    const { parts, query } = readHash();
    const [, run, name = "overview", key] = parts;
    navigation(parts[0] === "run" ? run : undefined, name);
    fill(view, el("p", { class: "dim" }, "loading"));
    if (parts[0] === "sweep" && run) await sweepView(view, run, query, signal);
    else if (parts.length && (parts[0] !== "run" || !run)) throw new Error(`there is no page #/${parts.join("/")}: #/ shows all runs`);
    else if (!parts.length) await runsView(view, query, signal);
    else if (DETAILS[name]) await DETAILS[name](view, run, key, query, signal);
    else if (VIEWS[name]) await VIEWS[name](view, run, query, signal, key);
    else throw new Error(`there is no view ${name}: ${Object.keys(VIEWS).join(", ")}`);
    if (!signal.aborted) view.setAttribute("data-ready", location.hash || "#/");
  } catch (error) {
    if (!signal.aborted) fill(view, el("p", { class: "bad" }, error.message));
  }
}

function navigation(run, here) {
  const nav = document.getElementById("nav");
  document.title = run ? `${run} · shoal` : "shoal";
  if (!run) return fill(nav);
  fill(nav, Object.keys(VIEWS).map((name) => {
    const item = link(["run", run, name], {}, name[0].toUpperCase() + name.slice(1));
    if (name === here) item.className = "here";
    return item;
  }));
}

window.addEventListener("hashchange", show);
show();
