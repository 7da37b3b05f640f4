// One sweep: a row for each combination of what was varied, its final success over the seeds, and a chart of means.
//   sweep/ID?key=reward/mean&x=tokens

import { ask } from "./api.js";
import { drawLines, meanBand } from "./charts.js";
import { el, fill, hash, link, num, select, table, text } from "./dom.js";
import { AXES } from "./runs.js";

const AGAIN_MS = 5000;

export async function sweepView(view, id, query, signal) {
  const choice = { key: query.key || "eval/success", x: query.x || "step" };
  const change = (values) => { location.hash = hash(["sweep", id], { ...choice, ...values }); };
  const [head, body, problem] = [el("p", { id: "progress" }), el("div", {}), el("p", { class: "bad" })];
  const chart = el("div", { class: "chart tall", id: "overlay" });
  const names = el("datalist", { id: "keys" });
  fill(view, el("h1", {}, `Sweep ${id}`), head, body,
    el("div", { class: "bar" }, el("input", { list: "keys", value: choice.key, size: 34, "aria-label": "metric", onchange: (event) => change({ key: event.target.value }) }), names,
      "over", select(AXES, choice.x, (x) => change({ x }), { "aria-label": "x-axis" }),
      el("span", { class: "dim" }, "a line is the mean over the seeds of a row, its band the range; of one run it is the run")), chart, problem);

  const show = async () => {
    const sweep = await ask(["sweep"], { id }, signal);
    const runs = sweep.rows.flatMap((row) => row.runs);
    fill(head, `${runs.length} of ${sweep.of} runs so far, ${runs.filter((run) => run.success_after !== null).length} of them with a result`);
    fill(body, tableOf(sweep));
    const answers = await Promise.allSettled(runs.slice(0, 64).map((run) => ask(["runs", run.run, "series"], { keys: choice.key, axis: choice.x }, signal)));
    if (signal.aborted) return [];
    const series = new Map(answers.filter((answer) => answer.status === "fulfilled").map(({ value }) => [value.run, value.series[choice.key]]));
    const lines = sweep.rows.map((row) => lineOf(row, sweep.keys, series, choice.x)).filter(Boolean);
    fill(problem, lines.length ? "" : `no run of it has ${choice.key}`);
    await drawLines(chart, lines, { title: choice.key, xTitle: AXES.find(([axis]) => axis === choice.x)?.[1] });
    return runs;
  };
  const [first] = await show();
  if (first) ask(["runs", first.run], {}, signal).then(({ keys }) => fill(names, keys.map(({ key }) => el("option", { value: key })))).catch(() => {});
  const timer = setInterval(() => { if (!document.hidden) show().catch(() => {}); }, AGAIN_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function tableOf(sweep) {
  const together = (row) => hash([], { runs: row.runs.map((run) => run.run).join(","), mean: "1", key: "eval/success" });
  return table([
    ...sweep.keys.map((key, i) => [key, (row) => text(row.settings[i])]),
    ...(sweep.keys.length ? [] : [["varied", () => "the seed alone"]]),
    ["success before", (row) => num(row.before, 3), true], ["success after", (row) => el("b", {}, num(row.mean, 3)), true],
    ["95% interval", (row) => (row.over ? `${num(row.low, 3)} to ${num(row.high, 3)} over ${row.over}` : "n/a"), true],
    ["seeds", (row) => row.seeds, true], ["held-out episodes", (row) => row.tasks, true],
    ["runs", (row) => row.runs.map((run) => [link(["run", run.run, "overview"], {}, `seed ${text(run.seed)}`), ` ${run.status}, step ${num(run.step)}`, el("br")]).flat()],
    ["", (row) => el("a", { href: together(row) }, "overlay")],
  ], sweep.rows, () => ({ "data-row": true }));
}

function lineOf(row, keys, series, x) {
  const lines = row.runs.map((run) => series.get(run.run)).filter((one) => one && one.y.length).map((one) => ({ x: one[x], y: one.y }));
  if (!lines.length) return null;
  const name = keys.map((key, i) => `${key}=${text(row.settings[i])}`).join(" ") || "all seeds";
  return lines.length > 1 ? meanBand(`${name}, ${lines.length} runs`, lines) : { name, ...lines[0] };
}
