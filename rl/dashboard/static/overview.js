// One run at a glance: state, newest numbers, panels A to G. New lines are added to the charts as they are written.

import { ask, follow } from "./api.js";
import { COLORS, drawLines, library } from "./charts.js";
import { el, fill, link, num } from "./dom.js";
import { sketch } from "./sketch.js";
import { alertsNode, glanceOf, histogramsNode } from "./glance.js";

// Names as in docs/runs.md. A name that ends in * stands for all that begin so.
const PANELS = [
  ["A. Learning", [["eval/success", "eval/ci95_low", "eval/ci95_high"], ["reward/mean", "reward/*"], ["eval/success/*", "eval/call_rate/*"],
    ["group/frac_mixed", "group/frac_all_good", "group/frac_all_bad"], ["curriculum/*"]]],
  ["B. Off-policy health", [["off_policy/lag/mean", "off_policy/lag/max"], ["policy/mismatch_kl/mean", "policy/mismatch_kl/max"],
    ["policy/ess_ratio"], ["off_policy/lag/count/*"], ["policy/mismatch_kl/lag/*"], ["off_policy/versions_per_trajectory"], ["policy/logprob_abs_diff/mean", "policy/logprob_abs_diff/max"],
    ["selection_bias/*"], ["policy/importance_ratio/mean", "policy/importance_ratio/max"],
    ["moe/replay_fallback_ratio"]]],
  ["C. Optimisation", [["loss/policy"], ["policy/entropy"], ["optim/grad_norm"], ["policy/clip_fraction", "policy/kl"], ["optim/lr"], ["advantage/mean", "advantage/std"], ["rows/*"]]],
  ["D. Throughput", [["trainer/tok_s"], ["rollout/busy_s"], ["rollout/episodes_s"], ["time/trainer_idle_ratio", "time/rollout_idle_ratio"],
    ["time/step", "time/wait_for_batch", "time/forward_backward", "time/sync", "time/checkpoint", "time/other"], ["weight_sync/latency_s"]]],
  ["E. Queue", [["queue/ready_groups", "queue/in_flight"], ["queue/oldest_age_s"]]],
  ["F. Episodes and tools", [["episode/turns/mean"], ["episode/tokens/mean"], ["tool/calls_mean"], ["tool/error_ratio", "tool/overuse", "tool/underuse", "tool/cost_share"], ["rollout/episode_s/mean", "rollout/env_s/mean"], ["stop/*"], ["env/error_ratio"]]],
  ["G. Health", [["workers/healthy"], ["faults/restarts", "faults/redispatched", "faults/dropped_groups"], ["monitor/non_finite", "monitor/dropped", "loss/nan_count"]]],
];
const NUMBERS = ["reward/mean", "eval/success", "off_policy/lag/max", "policy/entropy", "policy/mismatch_kl/mean", "optim/grad_norm",
  "trainer/tok_s", "time/trainer_idle_ratio", "group/frac_mixed", "env/error_ratio", "workers/healthy"];

// After the next frame; at once where a page in the background gets none.
const painted = () => new Promise((resolve) => {
  requestAnimationFrame(() => setTimeout(resolve));
  setTimeout(resolve, 100);
});

export async function overviewView(view, run, query, signal) {
  const [facts, told] = await Promise.all([ask(["runs", run], {}, signal), glanceOf(run, signal)]);
  const known = facts.keys.map(({ key }) => key);
  const latest = Object.fromEntries(facts.keys.map(({ key, last }) => [key, last]));
  const state = el("p", { id: "state" });
  const glance = el("div", { id: "glance" }, alertsNode(told));
  const numbers = el("div", { class: "numbers" });
  const counts = Object.entries(facts.trajectories).map(([status, n]) => link(["run", run, "trajectories"], { status }, `${n} ${status} `));
  const charts = [];
  let allDrawn = () => {};
  const panels = PANELS.map(([title, groups]) => {
    const found = groups.map((names) => expand(names, known)).filter((names) => names.length);
    if (!found.length) return null;
    return el("section", {}, el("h2", {}, title), el("div", { class: "grid" }, found.map((keys) => {
      const node = el("div", { class: "chart", "data-keys": keys.join(" ") });
      charts.push({ node, keys });
      return node;
    })));
  });
  fill(view, el("h1", {}, run), glance, state, el("p", {}, "trajectories: ", counts.length ? counts : "none yet"), numbers, panels,
    histogramsNode(run, query.step || "", signal, new Promise((resolve) => { allDrawn = resolve; })));
  showState(state, facts.state);
  showNumbers(numbers, latest);

  const store = {};
  let cursor = facts.cursor;
  const load = async (chosen) => {
    const keys = [...new Set(chosen.flatMap((chart) => chart.keys))].slice(0, 250).join(",");
    if (!keys) return;
    const answer = await ask(["runs", run, "series"], { keys, max_points: 500, axis: "step" }, signal);
    Object.assign(store, answer.series);
    cursor = answer.cursor;
    for (const { node, keys: names } of charts) if (names.every((key) => store[key])) sketch(node, linesOf(names), { title: titleOf(names), colors: COLORS });
  };
  const linesOf = (keys) => keys.map((key) => ({ name: key, x: store[key].step, y: store[key].y }));
  const titleOf = (keys) => (keys.length > 1 ? "" : keys[0]);
  await load(charts.slice(0, 1)); // a small question: the first chart is there while the rest is read
  await painted();
  library().catch(() => {}); // compiled while the server reads the rest; drawing tells what goes wrong
  if (charts.length > 1) await load(charts);
  // Numbers count the lines that the page has, so that a test can see that none came twice.
  // One after the other with a pause for the browser to paint: the first chart does not wait for the last.
  const draw = async () => {
    for (const { node, keys } of charts) {
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
  follow(run, cursor, {
    metrics: ({ rows }) => {
      for (const row of rows) append(store, row);
      for (const row of rows) for (const key of NUMBERS) if (key in row) latest[key] = row[key];
      showNumbers(numbers, latest);
      judge();
      if (!due) due = setTimeout(() => { due = null; if (!signal.aborted) draw(); }, 300);
    },
    event: ({ rows }) => { if (rows.some((row) => row.kind === "alert")) judge(); },
    state: (now) => showState(state, now),
    reset: () => window.dispatchEvent(new HashChangeEvent("hashchange")), // the run went back to a checkpoint
  }, signal);
  await started;
  allDrawn();
}

function append(store, row) {
  for (const [key, series] of Object.entries(store)) {
    if (!(key in row)) continue;
    series.step.push(row.step);
    series.y.push(row[key]);
    series.n += 1;
    if (series.y.length > 4000) { series.step.splice(0, 1000); series.y.splice(0, 1000); }
  }
}

function expand(names, known) {
  const found = names.flatMap((name) => (name.endsWith("*") ? known.filter((key) => key.startsWith(name.slice(0, -1))) : known.filter((key) => key === name)));
  return [...new Set(found)].slice(0, 8);
}

function showState(node, state) {
  const bad = ["failed", "crashed", "unreadable"].includes(state.status);
  fill(node, el("b", { class: bad ? "bad" : null }, state.status), ` at step ${num(state.step)}`, state.error ? el("pre", { class: "bad" }, state.error) : "");
}

function showNumbers(node, latest) {
  fill(node, NUMBERS.filter((key) => key in latest).map((key) => el("div", { "data-metric": key, title: key }, el("b", {}, num(latest[key], 3)), el("span", { class: "dim" }, key))));
}
