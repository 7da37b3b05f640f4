// All runs, and one chart over those that are ticked.

import { address, ask } from "./api.js";
import { drawLines, meanBand, smooth } from "./charts.js";
import { el, fill, hash, link, num, select, table, utc } from "./dom.js";

export const AXES = [["step", "step"], ["tokens", "trained tokens"], ["trajectories", "trajectories"], ["time_s", "wall time (s)"]];

export async function runsView(view, query, signal) {
  const { runs } = await ask(["runs"], {}, signal);
  const shown = runs.filter((run) => fits(run, query));
  if (!runs.length) return fill(view, el("p", {}, "No runs yet: shoal train env=calculator makes one."));
  const chosen = new Set(query.runs ? query.runs.split(",") : shown.slice(0, 4).map((run) => run.run));
  const choice = { key: query.key || "reward/mean", x: query.x || "step", smooth: query.smooth || "0", log: query.log || "", mean: query.mean || "",
    tag: query.tag || "", text: query.text || "" };
  const narrow = (values) => { location.hash = hash([], { ...choice, ...values }); }; // and the first that are left are drawn
  const change = (values) => {
    Object.assign(choice, values);
    history.replaceState(null, "", hash([], { ...choice, runs: [...chosen].join(",") }));
    draw();
  };
  const chart = el("div", { class: "chart tall", id: "overlay" });
  const names = el("datalist", { id: "keys" });
  const problem = el("p", { class: "bad" });
  const files = el("span", {});
  fill(view, el("h1", {}, "Runs"),
    el("div", { class: "bar" },
      el("input", { list: "keys", value: choice.key, size: 34, "aria-label": "metric", onchange: (event) => change({ key: event.target.value }) }), names,
      "over", select(AXES, choice.x, (x) => change({ x }), { "aria-label": "x-axis" }),
      "smoothing", select([["0", "none"], ["0.6", "0.6"], ["0.9", "0.9"], ["0.98", "0.98"]], choice.smooth, (value) => change({ smooth: value })),
      check("log scale", choice.log, (log) => change({ log })),
      check("mean and range over seeds", choice.mean, (mean) => change({ mean })), "CSV:", files),
    chart, problem,
    el("div", { class: "bar" }, "runs with",
      select([["", "any tag"], ...[...new Set(runs.flatMap((run) => run.tags))].sort().map((tag) => [tag, tag])], choice.tag, (tag) => narrow({ tag }), { "aria-label": "tag" }),
      el("input", { value: choice.text, size: 24, placeholder: "words in name or note", "aria-label": "text", onchange: (event) => narrow({ text: event.target.value }) }),
      el("span", { class: "dim" }, `${shown.length} of ${runs.length}; shoal note RUN writes notes and tags`)),
    table([
      ["", (run) => check("", chosen.has(run.run) ? "1" : "", (on) => { on ? chosen.add(run.run) : chosen.delete(run.run); change({}); })],
      ["run", (run) => link(["run", run.run, "overview"], {}, run.run)],
      ["status", (run) => el("span", { class: run.status === "failed" || run.status === "crashed" || run.fault ? "bad" : null, title: run.error || run.fault }, run.status || "unreadable")],
      ["step", (run) => num(run.step), true],
      ["settings", (run) => (run.group ? el("button", { title: "tick the runs of equal settings, all but the seed", onclick: () => together(run.group) }, run.group.slice(0, 4)) : "")],
      ["sweep", (run) => (run.sweep ? link(["sweep", run.sweep], {}, run.sweep) : "")],
      ["env", (run) => run.env || ""], ["seed", (run) => num(run.seed), true],
      ["success before", (run) => num(run.success_before, 3), true], ["success after", (run) => num(run.success_after, 3), true],
      ["started", (run) => (run.started_s ? utc(run.started_s).slice(0, 16) : "")],
      ["tags", (run) => run.tags.join(" ")], ["note", (run) => el("div", { class: "text" }, run.note)],
    ], shown));

  function together(group) {
    chosen.clear();
    runs.filter((run) => run.group === group).forEach((run) => chosen.add(run.run));
    history.replaceState(null, "", hash([], { ...choice, mean: "1", runs: [...chosen].join(",") }));
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  }

  async function draw() {
    const asked = [...chosen].filter((name) => runs.some((run) => run.run === name)).slice(0, 32);
    const answers = await Promise.allSettled(asked.map((run) => ask(["runs", run, "series"], { keys: choice.key, axis: choice.x }, signal)));
    if (signal.aborted) return;
    const found = answers.filter((answer) => answer.status === "fulfilled").map((answer) => answer.value);
    let lines = found.map((answer) => ({ run: answer.run, name: answer.run, x: answer.series[choice.key][choice.x], y: smooth(answer.series[choice.key].y, Number(choice.smooth)) }))
      .filter((line) => line.y.length);
    fill(problem, lines.length ? "" : `no chosen run has ${choice.key}`);
    fill(files, asked.map((run) => el("a", { href: address(["runs", run, "csv"]) + "?" + new URLSearchParams({ keys: choice.key }), title: run }, `${run.slice(-8)} `)));
    if (choice.mean && lines.length > 1) lines = bySeries(lines, runs).map(([name, members]) => meanBand(name, members));
    await drawLines(chart, lines, { title: choice.key, log: Boolean(choice.log), xTitle: AXES.find(([axis]) => axis === choice.x)?.[1] });
  }

  await draw();
  const first = [...chosen][0];
  if (first) ask(["runs", first], {}, signal).then(({ keys }) => fill(names, keys.map(({ key }) => el("option", { value: key })))).catch(() => {});
}

function fits(run, { tag, text: words }) {
  return (!tag || run.tags.includes(tag)) && (!words || `${run.run}\n${run.note}`.toLowerCase().includes(words.toLowerCase()));
}

// One line for the runs of equal settings, all but the seed: its mean and its range.
function bySeries(lines, runs) {
  const groups = new Map();
  for (const line of lines) {
    const run = runs.find(({ run: name }) => name === line.run);
    const key = run?.group || line.run;
    groups.set(key, { env: run?.env || line.run, members: [...(groups.get(key)?.members || []), line] });
  }
  return [...groups].map(([key, { env, members }]) => [`${env} ${key.slice(0, 4)}, ${members.length} runs`, members]);
}

function check(title, value, onchange) {
  const box = el("input", { type: "checkbox", checked: Boolean(value), "aria-label": title || "show", onchange: () => onchange(box.checked ? "1" : "") });
  return el("label", {}, box, ` ${title}`);
}
