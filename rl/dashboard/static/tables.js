// Views that are mostly a table: workers, ledger, config, logs, events, and the timeline.

import { address, ask, follow } from "./api.js";
import { drawTimeline } from "./charts.js";
import { el, fill, hash, link, num, select, table, text } from "./dom.js";
import { short } from "./lineage.js";

export async function workersView(view, run, query, signal) {
  const { workers, episodes_of: recent } = await ask(["runs", run, "workers"], {}, signal);
  fill(view, el("h1", {}, "Workers"), el("p", { class: "dim" }, `Episodes, tokens and rates are of the newest ${recent} trajectories.`),
    table([["process", (w) => w.process],
      ["state", (w) => el("span", { class: ["lost", "stale", "retired"].includes(w.state) ? "bad" : null }, text(w.state))], ["last did", (w) => text(w.activity)], ["until (s)", (w) => num(w.last_s), true],
      ["policy version", (w) => num(w.version), true], ["episodes", (w) => num(w.episodes), true], ["tokens", (w) => num(w.tokens), true],
      ["tokens per second of an episode", (w) => num(w.tok_s, 3), true], ["environment errors", (w) => num(w.errors), true],
      ["restarts", (w) => num(w.restarts || 0), true], ["last event", (w) => text(w.event)], ["last error", (w) => text(w.error)]], workers));
}

export async function ledgerView(view, run, query, signal) {
  const { audit, rows, next } = await ask(["runs", run, "ledger"], { state: query.state, group: query.group, before: query.before }, signal);
  const states = ["queued", "leased", "committed", "consumed", "dropped"];
  const balance = states.map((name) => `${name === "dropped" ? Object.values(audit.dropped).reduce((a, b) => a + b, 0) : audit[name]} ${name}`).join(" + ");
  const siblings = query.group ? await ask(["runs", run, "trajectories"], { group: query.group }, signal) : null;
  fill(view, el("h1", {}, "Ledger"),
    el("p", { id: "balance", class: audit.balanced ? "verdict" : "verdict bad" }, `${audit.issued} issued ${audit.balanced ? "=" : "≠"} ${balance}. `, audit.balanced ? "Every group that was issued is in exactly one state." : "The counts do not add up to the groups issued."),
    el("div", { class: "numbers" }, Object.entries(audit).filter(([, value]) => typeof value === "number").map(([name, value]) =>
      el("div", { "data-audit": name }, el("b", {}, value), el("span", { class: "dim" }, name.replaceAll("_", " "))))),
    el("p", {}, "dropped: ", Object.entries(audit.dropped).map(([why, n]) => `${why} ${n}`).join(", ") || "none"),
    siblings ? el("p", {}, link(["run", run, "trajectories"], { group: query.group }, `${siblings.rows.length} trajectories of ${query.group}`)) : null,
    el("div", { class: "bar" }, select([["", "any state"], ...states.map((s) => [s, s])], query.state || "", (state) => { location.hash = hash(["run", run, "ledger"], { state }); })),
    table([["#", (g) => g.ordinal, true], ["group", (g) => link(["run", run, "trajectories"], { group: g.group_id }, g.group_id)], ["state", (g) => g.state],
      ["lineage", (g) => link(["run", run, "lineage", g.group_id], {}, short(g))], ["worker", (g) => text(g.worker)], ["last trouble", (g) => text(g.last_cause)]], rows),
    el("p", {}, next ? link(["run", run, "ledger"], { state: query.state, before: next }, "older") : "no more"));
}

export async function configView(view, run, query, signal) {
  const [{ config, manifest }, { runs }] = await Promise.all([ask(["runs", run, "config"], {}, signal), ask(["runs"], {}, signal)]);
  const other = query.other ? (await ask(["runs", query.other, "config"], {}, signal)).config : null;
  const keys = [...new Set([...Object.keys(config), ...Object.keys(other || {})])];
  const differs = (key) => other && text(config[key]) !== text(other[key]);
  fill(view, el("h1", {}, "Config"),
    el("div", { class: "bar" }, "compare with", select([["", "no other run"], ...runs.filter((r) => r.run !== run).map((r) => [r.run, r.run])], query.other || "",
      (name) => { location.hash = hash(["run", run, "config"], { other: name }); }, { "aria-label": "other run" })),
    table([["setting", (key) => key], ["value", (key) => text(config[key])], ...(other ? [[query.other, (key) => text(other[key])]] : [])],
      keys.sort((a, b) => Boolean(differs(b)) - Boolean(differs(a))), (key) => (differs(key) ? { class: "different" } : {})),
    el("h2", {}, "Manifest"), el("pre", {}, JSON.stringify(manifest, null, 2)));
}

export async function logsView(view, run, query, signal) {
  const { logs } = await ask(["runs", run, "logs"], {}, signal);
  if (!logs.length) return fill(view, el("h1", {}, "Logs"), el("p", {}, "none: the run has no processes of its own"));
  const name = query.name || (logs.find((log) => log.bytes) || logs[0]).name;
  const page = el("pre", { class: "log" });
  let [all, next] = ["", -1];
  const here = (values) => hash(["run", run, "logs"], { name, filter: words.value, ...values });
  const words = el("input", { value: query.filter || "", placeholder: "lines with", "aria-label": "filter", oninput: () => { history.replaceState(null, "", here()); paint(); } });
  const paint = () => { page.textContent = all.split("\n").filter((line) => line.includes(words.value)).join("\n") || "empty"; };
  const more = async () => {
    const answer = await ask(["runs", run, "logs"], { name, offset: next }, signal);
    next = answer.next;
    if (answer.text) { all = (all + answer.text).slice(-500000); paint(); page.scrollTop = page.scrollHeight; }
  };
  fill(view, el("h1", {}, "Logs"), el("div", { class: "bar" }, select(logs.map((log) => [log.name, `${log.name} (${log.bytes} bytes)`]), name,
    (value) => { location.hash = here({ name: value }); }), words), page);
  paint();
  await more();
  const timer = setInterval(() => { if (!document.hidden) more().catch(() => {}); }, 2000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

export async function eventsView(view, run, query, signal) {
  const { events, cursor } = await ask(["runs", run, "events"], {}, signal);
  const body = el("div", {});
  const paint = () => fill(body, table([["time (s)", (e) => num(e.time_s), true], ["event", (e) => text(e.kind)],
    ["what", (e) => text(Object.fromEntries(Object.entries(e).filter(([name]) => !["kind", "time_s", "unix_s"].includes(name))))]], [...events].reverse().slice(0, 1000)));
  fill(view, el("h1", {}, "Events"), body);
  paint();
  follow(run, cursor, { event: ({ rows }) => { events.push(...rows); paint(); } }, signal);
}

export async function timelineView(view, run, query, signal) {
  const { spans } = await ask(["runs", run, "spans"], {}, signal);
  const whole = spans.filter((span) => typeof span.start_s === "number" && typeof span.end_s === "number");
  const chart = el("div", { class: "chart tall" });
  fill(view, el("h1", {}, "Timeline"), el("p", {}, `the newest ${whole.length} spans · `,
    el("a", { href: address(["runs", run, "perfetto.json"]), download: `${run}-trace.json` }, "all spans, for Perfetto")), chart);
  await drawTimeline(chart, whole);
}
