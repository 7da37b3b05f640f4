// The tokens of an episode: what sampled them, what the learner thought of them, and why one taught nothing.

import { ask } from "./api.js";
import { el, fill, link, num, table } from "./dom.js";

const PAGE = 500;

export async function tokensView(view, run, key, query, signal) {
  const offset = Number(query.offset || 0);
  const t = await ask(["runs", run, "tokens"], { row: key, offset, limit: PAGE }, signal);
  const rows = t.id.map((id, i) => {
    const learner = t.learner && t.mask[i] ? t.learner[i] : null;
    const ratio = learner === null || t.rollout[i] === null ? null : Math.exp(learner - t.rollout[i]);
    return { at: offset + i, id, text: t.text ? t.text[i] : "", mask: t.mask[i], rollout: t.mask[i] ? t.rollout[i] : null, learner, ratio,
      version: t.mask[i] ? t.version[i] : null, why: reason(t, t.mask[i], ratio) };
  });
  const here = ["run", run, "tokens", key];
  fill(view, el("h1", {}, `Tokens of trajectory ${key}`),
    el("p", {}, link(["run", run, "trajectory", key], {}, "conversation"), ` · ${t.num_tokens} tokens · advantage ${num(t.advantage)}`,
      offset > 0 ? [" · ", link(here, { offset: Math.max(0, offset - PAGE) }, "before")] : null,
      offset + t.id.length < t.num_tokens ? [" · ", link(here, { offset: offset + PAGE }, "after")] : null),
    el("p", { class: "dim", id: "ratio" }, "ratio = exp(learner - rollout), of the weights at the start of the step. ", t.clip_low === null
      ? "What the loss of this run clips cannot be told from it." : "The loss clips it on the side that the advantage pushes to."),
    table([["#", (r) => r.at, true], ["id", (r) => r.id, true], ["text", (r) => el("code", {}, JSON.stringify(r.text))], ["mask", (r) => r.mask, true],
      ["version", (r) => num(r.version), true], ["rollout logprob", (r) => num(r.rollout), true], ["learner logprob", (r) => num(r.learner), true],
      ["ratio", (r) => num(r.ratio), true], ["why not trained", (r) => r.why]], rows));
}

function reason(t, mask, ratio) {
  if (!mask) return "not sampled: prompt, tool result or mark";
  if (t.status === "committed") return "waits for the learner";
  if (t.status !== "consumed") return t.cause ? `${t.status}: ${t.cause}` : t.status;
  if (t.cause) return t.cause;
  if (ratio === null) return "the learner did not compute it";
  if (t.clip_low === null) return ""; // see _limits_of_ratio in server.py
  const [low, high, cap] = [1 - t.clip_low, 1 + t.clip_high, t.tis_cap || Infinity];
  if (ratio > cap && (t.advantage < 0 || cap < high)) return `ratio over ${num(cap)}: cut off by tis_cap`;
  if (t.advantage > 0 && ratio > high) return `ratio over ${num(high)}: clipped`;
  if (t.advantage < 0 && ratio < low) return `ratio under ${num(low)}: clipped`;
  return "";
}
