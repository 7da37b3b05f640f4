// The life of a group, event by event with its times, and what became of each of its trajectories.
//   lineage              newest events of all groups
//   lineage/GROUP?row=3  one group; the row's own attempt is marked

import { ask } from "./api.js";
import { el, fill, link, num, table, text, utc } from "./dom.js";

const FACTS = [["attempt", (e) => num(e.attempt), true], ["worker", (e) => text(e.worker)], ["step", (e) => num(e.step), true], ["why", (e) => text(e.cause)]];

export async function lineageView(view, run, query, signal, group) {
  if (!group) return newest(view, run, query, signal);
  const [told, { rows }] = await Promise.all([ask(["runs", run, "lineage"], { group }, signal),
    ask(["runs", run, "trajectories"], { group, limit: 200 }, signal)]);
  const mine = rows.find((row) => String(row.row) === query.row);
  const began = told.events.length ? told.events[0].unix_s : 0;
  const here = (event) => Boolean(mine && event.attempt === mine.group_attempt);
  fill(view, el("h1", {}, `Lineage of ${group}`),
    el("p", { id: "story", class: "verdict" }, told.story || short(told.group)),
    told.story ? null : el("p", { class: "dim" }, "The ledger is older than its table of events: times and attempts of the beginning are not known."),
    el("p", {}, `now ${told.group.state} · `, link(["run", run, "ledger"], { group }, "ledger"), " · ", link(["run", run, "trajectories"], { group }, "its trajectories")),
    table([["event", (e) => el("b", {}, e.event)], ["UTC", (e) => utc(e.unix_s)], ["since issued (s)", (e) => num(e.unix_s - began), true],
      ["since the one before (s)", (e) => num(e.unix_s - (before(told.events, e) ?? e).unix_s), true], ...FACTS], told.events,
      (e) => ({ "data-event": e.number, class: here(e) ? "different" : null })),
    el("h2", {}, mine ? `Trajectory ${mine.row} and the others of its group` : "Its trajectories"),
    table([["row", (r) => link(["run", run, "trajectory", r.row], {}, r.row), true], ["member", (r) => num(r.member), true], ["attempt", (r) => num(r.group_attempt), true],
      ["became", (r) => r.status], ["why", (r) => r.cause], ["step", (r) => num(r.step), true], ["reward", (r) => num(r.reward), true],
      ["stop", (r) => r.stop_reason], ["worker", (r) => r.worker], ["policy versions", (r) => `${r.min_version} to ${r.max_version}`, true]], rows,
      (r) => (r === mine ? { class: "different" } : {})));
}

async function newest(view, run, query, signal) {
  const { events, next } = await ask(["runs", run, "lineage"], { before: query.before }, signal);
  fill(view, el("h1", {}, "Lineage"), el("p", { class: "dim" }, "What happened to groups, newest first; a group's name leads to its whole life."),
    table([["#", (e) => e.number, true], ["UTC", (e) => utc(e.unix_s)], ["group", (e) => link(["run", run, "lineage", e.group_id], {}, e.group_id)],
      ["event", (e) => el("b", {}, e.event)], ...FACTS], events, (e) => ({ "data-event": e.number })),
    el("p", {}, next ? link(["run", run, "lineage"], { before: next }, "older") : "no more"));
}

function before(events, event) {
  return events[events.indexOf(event) - 1];
}

// From where a group stands alone, for ledgers without events and for lists.
export function short(group) {
  const story = ["issued"];
  if (group.attempt) story.push(`leased ${group.attempt}x`);
  if (group.redispatched) story.push(`given out again ${group.redispatched}x`);
  if (group.refused_commits) story.push(`${group.refused_commits} late answers refused`);
  if (group.state === "committed") story.push("committed, waits for the learner");
  if (group.state === "consumed") story.push("committed", `consumed at step ${group.step}`);
  if (group.state === "dropped") story.push(`dropped: ${group.reason}`);
  return story.join(" → ");
}
