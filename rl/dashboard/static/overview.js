// One run at a glance: state, newest numbers, panels A to G. New lines are added to the charts as they are written.

import { ask, follow } from "./api.js";
import { COLORS, drawLines, library } from "./charts.js";
import { el, fill, link, num } from "./dom.js";
import { sketch } from "./sketch.js";
import { alertsNode, glanceOf, histogramsNode } from "./glance.js";

// Names as in docs/runs.md. A name that ends in * stands for all that begin so.
const PANELS = [
  ["A. Learning", [["eval/success", "eval/ci95_low", "eval/ci95_high"], ["reward/mean", "reward/*"], ["eval/success/*", "eval/call_rate/*"],
    ["group/frac_mixed", "group/frac_all_good", "group/frac_all_bad"], ["curriculum/*"], ["eval/reward"], ["eval/turns", "eval/tool_calls"], ["eval/n", "eval/errors"]]],
  ["B. Off-policy health", [["off_policy/lag/mean", "off_policy/lag/max"], ["policy/mismatch_kl/mean", "policy/mismatch_kl/max"],
    ["policy/ess_ratio"], ["off_policy/lag/count/*"], ["policy/mismatch_kl/lag/*"], ["off_policy/versions_per_trajectory"], ["policy/logprob_abs_diff/mean", "policy/logprob_abs_diff/max"],
    ["selection_bias/*"], ["policy/importance_ratio/mean", "policy/importance_ratio/max"],
    ["moe/replay_fallback_ratio"]]],
  ["C. Optimisation", [["loss/policy"], ["policy/entropy"], ["optim/grad_norm"], ["policy/clip_fraction", "policy/kl"], ["optim/lr"], ["advantage/mean", "advantage/std"], ["rows/*"]]],
  ["D. Throughput", [["trainer/tok_s"], ["trainer/tokens"], ["rollout/busy_s"], ["rollout/episodes_s"], ["time/trainer_idle_ratio", "time/rollout_idle_ratio"],
    ["time/step", "time/wait_for_batch", "time/wait_for_evaluation", "time/forward_backward", "time/sync", "time/checkpoint", "time/other", "time/train"], ["weight_sync/latency_s"]]],
  ["E. Queue", [["queue/ready_groups", "queue/in_flight"], ["queue/oldest_age_s"]]],
  ["F. Episodes and tools", [["episode/turns/mean"], ["episode/tokens/mean"], ["tool/calls_mean"], ["tool/offered", "tool/error_ratio", "tool/overuse", "tool/underuse", "tool/cost_share"], ["tool/productivity"], ["rollout/episode_s/mean", "rollout/env_s/mean"], ["stop/*"], ["env/error_ratio"]]],
  ["G. Health", [["workers/healthy"], ["faults/restarts", "faults/redispatched", "faults/dropped_groups"], ["monitor/non_finite", "monitor/dropped", "loss/nan_count"]]],
];
const NUMBERS = ["reward/mean", "eval/success", "off_policy/lag/max", "policy/entropy", "policy/mismatch_kl/mean", "optim/grad_norm",
  "trainer/tok_s", "time/trainer_idle_ratio", "group/frac_mixed", "env/error_ratio", "workers/healthy"];

const MAX_POINTS = 4000; // of a series, in the page; past it the server is asked anew, which thins without losing a spike
const buildAnew = () => window.dispatchEvent(new HashChangeEvent("hashchange"));

// After the next frame; at once where a page in the background gets none.
const painted = () => new Promise((resolve) => {
  requestAnimationFrame(() => setTimeout(resolve));
  setTimeout(resolve, 100);
});

export async function overviewView(view, run, query, signal) {
  const [facts, told] = await Promise.all([ask(["runs", run], {}, signal), glanceOf(run, signal)]);
  const known = new Map(facts.keys.map(({ key, n }) => [key, n]));
  const latest = Object.fromEntries(facts.keys.map(({ key, last, step }) => [key, { value: last, step }]));
  let newest = facts.last.step ?? 0;
  const state = el("p", { id: "state" });
  const glance = el("div", { id: "glance" }, alertsNode(told));
  const numbers = el("div", { class: "numbers" });
  const counts = Object.entries(facts.trajectories).map(([status, n]) => link(["run", run, "trajectories"], { status }, `${n} ${status} `));
  const charts = new Map(); // names of a panel -> its node, and the keys that the run has of them
  const panels = el("div", {});
  let allDrawn = () => {};
  const arrange = () => {
    const keys = [...known.keys()].sort();
    fill(panels, PANELS.map(([title, groups]) => {
      const nodes = groups.map((names) => chartOf(names, expand(names, keys))).filter(Boolean);
      return nodes.length ? el("section", {}, el("h2", {}, title), el("div", { class: "grid" }, nodes)) : null;
    }));
  };
  const chartOf = (names, keys) => {
    if (!keys.length) return null;
    const node = charts.get(names)?.node || el("div", { class: "chart" });
    charts.set(names, { node, keys });
    node.setAttribute("data-keys", keys.join(" "));
    return node;
  };
  arrange();
  fill(view, el("h1", {}, run), glance, state, el("p", {}, "trajectories: ", counts.length ? counts : "none yet"), numbers, panels,
    histogramsNode(run, query.step || "", signal, new Promise((resolve) => { allDrawn = resolve; })));
  showState(state, facts.state);
  showNumbers(numbers, latest, newest);

  const store = {}; // key -> step, y, n of the file's points that are in them, and how many the stream has come past
  const load = async (chosen) => {
    const keys = [...new Set(chosen.flatMap((chart) => chart.keys))].slice(0, 250).join(",");
    if (!keys) return;
    const answer = await ask(["runs", run, "series"], { keys, max_points: 500, axis: "step" }, signal);
    for (const [key, series] of Object.entries(answer.series)) store[key] = joined(series, store[key] || { past: known.get(key) });
    for (const { node, keys: names } of charts.values()) if (names.every((key) => store[key])) sketch(node, linesOf(names), { title: titleOf(names), colors: COLORS });
  };
  const linesOf = (keys) => keys.map((key) => ({ name: key, x: store[key].step, y: store[key].y }));
  const titleOf = (keys) => (keys.length > 1 ? "" : keys[0]);
  await load([...charts.values()].slice(0, 1)); // a small question: the first chart is there while the rest is read
  await painted();
  library().catch(() => {}); // compiled while the server reads the rest; drawing tells what goes wrong
  if (charts.size > 1) await load([...charts.values()]);
  // Numbers count the lines that the page has, so that a test can see that none came twice.
  // One after the other with a pause for the browser to paint: the first chart does not wait for the last.
  const draw = async () => {
    for (const { node, keys } of charts.values()) {
      if (signal.aborted || !keys.every((key) => store[key])) continue;
      node.setAttribute("data-points", store[keys[0]].n);
      await drawLines(node, linesOf(keys), { title: titleOf(keys), xTitle: "step" });
      await new Promise((resolve) => { setTimeout(resolve); });
    }
  };
  const started = draw();
  let [due, judging] = [null, null];
  const judge = () => { judging = judging || setTimeout(async () => {
    judging = null;
    try { if (!signal.aborted) fill(glance, alertsNode(await glanceOf(run, signal))); } catch { /* the next line asks again */ }
  }, 1500); };
  const add = (names) => { // what the run had not written yet when the page was opened
    for (const name of names) known.set(name, 0);
    arrange();
    const shown = new Set([...charts.values()].flatMap(({ keys }) => keys));
    for (const name of names) if (shown.has(name)) store[name] = { step: [], y: [], n: 0, past: 0 };
  };
  let asking = null;
  const thin = () => { asking = asking || load([...charts.values()]).then(draw).catch(() => {}).finally(() => { asking = null; }); };
  follow(run, facts.cursor, { // from where `facts` was read to, so that no name is missed
    metrics: ({ rows }) => {
      if (facts.last.kind !== "step" && rows.some((row) => row.kind === "step")) return buildAnew(); // what is below the charts is new, too
      const names = new Set(rows.flatMap((row) => Object.keys(row).filter((name) => !known.has(name) && isNumber(row[name]))));
      if (names.size) add(names);
      for (const row of rows) append(store, row);
      if (Object.values(store).some(({ y }) => y.length > MAX_POINTS)) thin();
      for (const row of rows) for (const key of NUMBERS) if (key in row) latest[key] = { value: row[key], step: row.step };
      newest = Math.max(newest, ...rows.map((row) => row.step));
      showNumbers(numbers, latest, newest);
      judge();
      if (!due) due = setTimeout(() => { due = null; if (!signal.aborted) draw(); }, 300);
    },
    event: ({ rows }) => { if (rows.some((row) => row.kind === "alert")) judge(); },
    state: (now) => showState(state, now),
    reset: buildAnew, // the run went back to a checkpoint
  }, signal);
  await started;
  allDrawn();
}

function append(store, row) {
  for (const [key, series] of Object.entries(store)) {
    if (!(key in row)) continue;
    series.past += 1;
    if (series.past <= series.n) continue; // the server had it already when it was asked
    series.step.push(row.step);
    series.y.push(row[key]);
    series.n += 1;
  }
}

// What the server answered, and what the stream brought while it did.
function joined(series, { step, y, past }) {
  const more = past - series.n;
  if (!step || more <= 0) return { ...series, past };
  return { step: [...series.step, ...step.slice(-more)], y: [...series.y, ...y.slice(-more)], n: past, past };
}

const isNumber = (value) => value === null || typeof value === "number"; // null: one that was not finite

function expand(names, known) {
  const found = names.flatMap((name) => (name.endsWith("*") ? known.filter((key) => key.startsWith(name.slice(0, -1))) : known.filter((key) => key === name)));
  return [...new Set(found)].slice(0, 8);
}

function showState(node, state) {
  const bad = ["failed", "crashed", "unreadable"].includes(state.status);
  fill(node, el("b", { class: bad ? "bad" : null }, state.status), ` at step ${num(state.step)}`, state.error ? el("pre", { class: "bad" }, state.error) : "");
}

// A metric that the newest step does not tell is shown with the step of its value, and dimmed.
function showNumbers(node, latest, newest) {
  fill(node, NUMBERS.filter((key) => key in latest).map((key) => {
    const { value, step } = latest[key];
    const old = step < newest;
    return el("div", { "data-metric": key, "data-step": step, class: old ? "old" : null, title: `${key} at step ${num(step)}` },
      el("b", {}, num(value, 3)), el("span", { class: "dim" }, old ? `${key}, step ${num(step)}` : key));
  }));
}
