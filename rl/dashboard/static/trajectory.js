// One episode: turns by role, calls and results, images, what it was worth, and the rest of its group.

import { address, ask } from "./api.js";
import { el, fill, link, num, table, text } from "./dom.js";
import { short } from "./lineage.js";

const MAX_SIDE = 16; // conversations of one group shown at once

export async function trajectoryView(view, run, key, query, signal) {
  const t = await ask(["runs", run, "trajectory"], { row: key }, signal);
  const story = t.split === "train" ? await storyOf(run, t.group_id, signal) : "held out: no group of the ledger";
  const parts = Object.entries(t.reward_parts || {});
  const facts = [["environment", `${t.env_name}, level ${t.level}, seed ${t.seed}`], ["reward", num(t.reward)],
    ["reward parts", parts.map(([name, value]) => `${name} ${num(value)}`).join(", ") || "none"], ["advantage", num(t.advantage)],
    ["status", t.cause ? `${t.status} (${t.cause})` : t.status], ["trained at step", num(t.step)], ["staleness", num(t.staleness)],
    ["policy versions", `${t.min_version} to ${t.max_version}`], ["stop reason", t.stop_reason],
    ["tokens", `${t.num_tokens}, sampled ${t.num_sampled_tokens}`], ["time", `${num(t.seconds, 3)} s, of it environment ${num(t.env_seconds, 3)} s`],
    ["worker", t.worker], ["engine", t.engine], ["lineage of its group", story], ["attempt", `${t.attempt}, of the group ${t.group_attempt}`]];
  fill(view, el("h1", {}, t.id),
    el("p", {}, link(["run", run, "tokens", key], {}, "tokens"), " · ", link(["run", run, "lineage", t.group_id], { row: key }, "lineage"), " · ", link(["run", run, "ledger"], { group: t.group_id }, "ledger"),
      " · ", el("code", {}, `shoal show ${run} --traj ${key}`)),
    table([["", (fact) => fact[0]], ["", (fact) => fact[1]]], facts),
    t.error ? el("div", {}, el("h2", {}, "Error"), el("pre", { class: "bad" }, text(t.error))) : null,
    t.meta?.printed ? el("div", {}, el("h2", {}, "Printed"), el("pre", {}, text(t.meta.printed))) : null,
    el("h2", {}, "Conversation"),
    conversation(run, t),
    el("h2", {}, `Its group: ${t.group_id}`),
    el("p", {}, link(["run", run, "trajectory", key], { side: query.side ? "" : 1 }, query.side ? "facts alone" : "conversations side by side")),
    el("div", { class: query.side ? "siblings side" : "siblings" }, t.siblings.map((sibling) => el("div", { class: sibling.row === t.row ? "sibling here" : "sibling" },
      link(["run", run, "trajectory", sibling.row], {}, `member ${sibling.member}`), el("br"), `reward ${num(sibling.reward)}`, el("br"),
      `advantage ${num(sibling.advantage, 3)}`, el("br"), `${sibling.num_turns} turns, ${sibling.num_sampled_tokens} tokens`, el("br"), sibling.stop_reason,
      query.side && sibling.row !== t.row ? el("div", { "data-side": sibling.row }) : null,
      query.side && sibling.row === t.row ? conversation(run, t) : null))));
  if (query.side) await Promise.all([...view.querySelectorAll("[data-side]")].map(async (node, index) => {
    if (index >= MAX_SIDE) return fill(node, el("p", { class: "dim" }, `only ${MAX_SIDE} conversations are shown at once`));
    try {
      fill(node, conversation(run, await ask(["runs", run, "trajectory"], { row: node.dataset.side }, signal)));
    } catch (error) {
      if (signal.aborted) throw error;
      fill(node, el("p", { class: "bad" }, String(error.message)));
    }
  }));
}

function conversation(run, t) {
  return el("div", {},
    t.too_large ? el("p", { class: "bad" }, `The conversation has ${t.too_large} bytes: too large for the page.`) : null,
    t.prompt.map((message) => messageNode(run, message)),
    t.turns.map((turn, i) => [
      el("p", { class: "dim" }, `turn ${i + 1}: ${turn.end - turn.start} tokens by policy version ${turn.versions.join(", ")}, ${turn.finish_reason}, `
        + `sampled in ${num(turn.sample_s, 3)} s, environment ${num(turn.env_s, 3)} s · `, link(["run", run, "tokens", t.row], { offset: turn.start }, "tokens")),
      messageNode(run, turn.message), turn.reply.map((message) => messageNode(run, message))]).flat(3));
}

async function storyOf(run, group, signal) {
  try {
    const told = await ask(["runs", run, "lineage"], { group }, signal);
    return told.story || short(told.group);
  } catch (error) {
    if (signal.aborted) throw error;
    return String(error.message); // episodes that were only served have no ledger
  }
}

function messageNode(run, message) {
  return el("div", { class: `message ${["system", "user", "assistant", "tool"].includes(message.role) ? message.role : ""}` },
    el("b", {}, message.role),
    message.content.map((part) => ("text" in part ? el("div", { class: "text" }, part.text) : imageNode(run, part))),
    message.tool_calls.map((call) => el("div", { class: "call" }, el("b", {}, call.name), el("pre", {}, JSON.stringify(call.arguments, null, 1)),
      call.error ? el("div", { class: "bad" }, `malformed: ${call.error}`) : null)),
    message.tool_result ? el("div", { class: "result" }, el("pre", {}, Object.entries(message.tool_result)
      .filter(([, value]) => value !== null && value !== "").map(([name, value]) => `${name}: ${text(value)}`).join("\n"))) : null);
}

function imageNode(run, part) {
  if (!part.image_sha256) return el("div", { class: "dim" }, "[image of an older layout: shoal show tells its size]");
  return el("img", { src: address(["runs", run, "images", part.image_sha256]), alt: `image ${part.image_sha256.slice(0, 12)}`, loading: "lazy" });
}
