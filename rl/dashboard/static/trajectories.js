// Episodes of a run, newest first, by page, under filters that are part of the address.

import { ask } from "./api.js";
import { el, fill, hash, link, num, select, table } from "./dom.js";

const SELECTS = ["env", "level", "status", "stop", "cause"];
const INPUTS = [["min_reward", "reward from"], ["max_reward", "to"], ["min_staleness", "staleness from"], ["step", "step"], ["group", "group"], ["text", "text"]];

export async function trajectoriesView(view, run, query, signal) {
  const [facets, answer] = await Promise.all([
    ask(["runs", run, "facets"], {}, signal), ask(["runs", run, "trajectories"], query, signal)]);
  const go = (values) => { location.hash = hash(["run", run, "trajectories"], { ...query, before: "", ...values }); };
  const bar = el("div", { class: "bar" },
    SELECTS.map((name) => select([["", `any ${name}`], ...(facets[name] || []).filter((v) => v !== "").map((v) => [String(v), String(v).slice(0, 60)])],
      query[name] || "", (value) => go({ [name]: value }), { "aria-label": name })),
    INPUTS.map(([name, title]) => el("label", {}, `${title} `, el("input", { name, value: query[name] || "", size: name === "text" || name === "group" ? 18 : 4,
      onchange: (event) => go({ [name]: event.target.value }) }))));
  fill(view, el("h1", {}, "Trajectories"), bar,
    answer.cut ? el("p", { class: "bad" }, "The search was stopped after a while: narrow it.") : null,
    trajectoryTable(run, answer.rows),
    el("p", {}, answer.next ? link(["run", run, "trajectories"], { ...query, before: answer.next }, "older") : "no more"));
}

export function trajectoryTable(run, rows) {
  return table([
    ["row", (r) => link(["run", run, "trajectory", r.row], {}, r.row), true],
    ["env", (r) => r.env_name], ["level", (r) => num(r.level), true],
    ["group", (r) => link(["run", run, "trajectories"], { group: r.group_id }, r.group_id)],
    ["reward", (r) => num(r.reward), true], ["advantage", (r) => num(r.advantage, 3), true],
    ["stop", (r) => r.stop_reason], ["status", (r) => r.status], ["cause", (r) => r.cause],
    ["step", (r) => num(r.step), true], ["staleness", (r) => num(r.staleness), true],
    ["turns", (r) => num(r.num_turns), true], ["tokens", (r) => num(r.num_sampled_tokens), true],
    ["versions", (r) => (r.min_version === r.max_version ? r.min_version : `${r.min_version} to ${r.max_version}`), true],
    ["worker", (r) => r.worker],
  ], rows);
}
