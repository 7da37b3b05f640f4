// The top and the foot of the overview: what limits the run, its alerts, and how one step's trajectories were spread.

import { ask } from "./api.js";
import { drawHeatMaps, drawHistograms } from "./charts.js";
import { el, fill, hash, num, table, text } from "./dom.js";

const SPREADS = [["staleness", "staleness (versions)"], ["ratio", "ratio exp(learner - rollout)"], ["length", "length (tokens)"]];

export function glanceOf(run, signal) {
  return ask(["runs", run, "glance"], {}, signal);
}

const BAD_STATES = ["collapsed", "nothing to learn from", "environment failing"];

export function alertsNode({ learning, limit, sentence, active, alerts }) {
  const line = el("div", {},
    el("p", { id: "learning", class: BAD_STATES.includes(learning.state) ? "verdict bad" : "verdict", "data-state": learning.state }, el("b", {}, learning.sentence)),
    el("p", { id: "verdict", class: "verdict", "data-limit": limit }, sentence));
  const lasting = active.map((alert) => el("p", { class: "verdict bad", "data-alert": alert.rule }, el("b", {}, alert.rule), `: ${text(alert.text)}`));
  if (!alerts.length) return [line, el("p", { class: "dim", id: "alerts" }, "no alerts")];
  const rows = table([["time (s)", (a) => num(a.time_s), true], ["step", (a) => num(a.step), true], ["rule", (a) => a.rule], ["", (a) => a.state],
    ["value", (a) => num(a.value), true], ["limit", (a) => num(a.threshold), true], ["what", (a) => text(a.text)]], alerts);
  return [line, lasting, el("details", { id: "alerts", open: active.length > 0 }, el("summary", {}, `${alerts.length} alerts, ${active.length} active`), rows)].flat();
}

// Begun when the overview's own charts are `drawn`, so that the first of them does not wait.
export function histogramsNode(run, step, signal, drawn) {
  const title = el("span", {});
  const grid = el("div", { class: "grid" });
  const draw = async (asked) => {
    const found = await ask(["runs", run, "histograms"], { step: asked }, signal);
    const shown = SPREADS.filter(([name]) => found[name]?.counts);
    fill(title, found.n ? ` the ${found.n} trajectories of ` : ` no trained trajectory of `);
    input.value = found.step || asked;
    const nodes = shown.map(([name]) => el("div", { class: "chart", "data-histogram": name }));
    fill(grid, nodes);
    await drawHistograms(nodes, shown.map(([name, words]) => ({ ...found[name], name: words })));
  };
  const later = (asked) => draw(asked).catch((error) => { if (!signal.aborted) fill(title, error.message); });
  const choose = (asked) => { history.replaceState(null, "", hash(["run", run, "overview"], { step: asked })); later(asked); };
  const input = el("input", { size: 5, value: step, "aria-label": "step of the histograms", onchange: () => choose(input.value) });
  drawn.then(() => later(step));
  return el("section", {}, el("h2", {}, "One step"), el("p", {}, title, "step ", input), grid, heatMapsNode(run, choose, signal, drawn));
}

// The same three over all steps; a click on a column shows its last step above.
function heatMapsNode(run, onstep, signal, drawn) {
  const grid = el("div", { class: "grid" });
  const words = el("p", { class: "dim" });
  const draw = async () => {
    const found = await ask(["runs", run, "heatmaps"], {}, signal);
    const shown = SPREADS.filter(([name]) => found[name]?.counts);
    if (!shown.length) return;
    fill(words, "All steps: a column is a stretch of steps, a cell its share of what the stretch trained; a click shows that step above. "
      + "Ratios are of a few trajectories of each stretch, and the outermost bins hold what lies beyond.");
    const nodes = shown.map(([name]) => el("div", { class: "chart", "data-heatmap": name }));
    fill(grid, nodes);
    await drawHeatMaps(nodes, found.steps, shown.map(([name, title]) => ({ ...found[name], name: title, log: name === "ratio" })), onstep);
  };
  drawn.then(draw).catch((error) => { if (!signal.aborted) fill(words, error.message); });
  return el("div", {}, words, grid);
}
