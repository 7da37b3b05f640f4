"""Every number that the overview shows, worked out again from the rows of a run whose time is scripted.

The real controller, scheduler, ledger, recorder and learner run on a loop with a clock of its own; what they wrote is
all that the numbers below are made of: trajectories.db, ledger.sqlite, spans.jsonl, events.jsonl. A number that is new
on the page fails here until it is said where it comes from.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy.model.checkpoint_io import load_numpy_tensors
from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import PRESETS
from rl.dashboard.server import Dashboard, Stop
from rl.loop.step_time import PARTS
from rl.runs.checkpoint import read_checkpoint
from rl.runs.run_folder import RunFolder
from rollout.dialects.dialect import make_dialect
from tests.docs.documentation import DOCS, table_names
from tests.rl.overview_run import HEARTBEAT_S, LEARNER_S, SAVE_S, SNAPSHOT_S, TRAIN_S, Stored, scripted_run
from tests.rl.training import small_config, train_in_process
from tests.virtual_time import seconds_by

FROM_WEIGHTS = {"policy/entropy", "optim/grad_norm"}
"""Not of rows alone: worked out for the steps that begin at a checkpoint."""
OVERVIEW = Path(__file__).parents[2] / "rl" / "dashboard" / "static" / "overview.js"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return scripted_run(tmp_path_factory)


# --- the numbers, area by area ----------------------------------------------------------------------------------------


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _learning(stored: Stored, step: int) -> dict[str, float]:
    rows = [row for row in stored.trained(step) if row["reward"] is not None]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], []).append(row["reward"])
    kinds = Counter("mixed" if len(set(r)) > 1 else "all_good" if r[0] == 1 else "all_bad" for r in groups.values())
    parts = sorted({part for row in rows for part in json.loads(row["reward_parts"])})
    ended = [(t, g) for t, event, g, _ in stored.ledger if event in ("committed", "dropped")]
    seen = [group for t, group in ended if t <= stored.window(step)[1]][-20:]
    members = {g: [row["reward"] for row in stored.rows if row["group_id"] == g] for g in seen}
    advantages = [row["advantage"] for row in rows]
    return {
        "reward/mean": _mean(row["reward"] for row in rows),
        "reward/calculator/mean": _mean(row["reward"] for row in rows if row["env_name"] == "calculator"),
        **{f"reward/{part}": _mean(json.loads(row["reward_parts"])[part] for row in rows) for part in parts},
        **{f"group/frac_{kind}": kinds[kind] / len(groups) for kind in ("mixed", "all_good", "all_bad")},
        "advantage/mean": float(np.mean(advantages)),
        "advantage/std": float(np.std(advantages)),
        "curriculum/calculator/frontier": rows[0]["level"],
        "curriculum/calculator/success/0": _mean(_mean(r == 1.0 for r in members[g]) for g in seen),
        "curriculum/calculator/zero_variance/0": _mean(len(set(members[g])) == 1 for g in seen),
        "curriculum/gated_groups": stored.count("dropped", stored.window(step)[1], but="attempts"),
    }


def _taught(stored: Stored, step: int) -> list[dict[str, Any]]:
    """Rows of a step that moved the weights: a reward like all others of its group teaches nothing."""
    return [row for row in stored.trained(step) if row["advantage"]]


def _objective(stored: Stored, step: int, learner_logprobs: Sequence[Any], xp: Any) -> tuple[Any, float, float]:
    """(loss, tokens clipped, KL summed), by the formula in rl/algorithm/loss.py, row by row. `xp`: numpy or torch."""
    config = stored.config.learner.loss
    num_tokens = sum(int(row["mask"].sum()) for row in stored.trained(step) if row["advantage"] is not None)
    loss, clipped, kl = 0.0, 0.0, 0.0
    for row, logprobs in zip(_taught(stored, step), learner_logprobs, strict=True):
        rollout = np.frombuffer(row["rollout_logprobs"], "<f4")[row["mask"]].astype(np.float64)
        change = logprobs - xp.asarray(rollout)
        ratio = xp.clip(xp.exp(change), 0.0, config.tis_cap)
        free, bound = ratio * row["advantage"], xp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        bound = bound * row["advantage"]
        loss = loss - xp.minimum(free, bound).sum() / num_tokens
        clipped += float((bound < free).sum())
        change = np.asarray(logprobs.detach() if xp is torch else logprobs) - rollout
        kl += float((np.exp(change) - 1 - change).sum())
    return loss, clipped, kl


def _optimization(stored: Stored, step: int) -> dict[str, float]:
    rows = _taught(stored, step)
    optimizer = stored.config.learner.optimizer
    numbers = {"optim/lr": optimizer.lr * min(1.0, step / optimizer.warmup_steps)}
    if not rows:
        return numbers
    logprobs = [np.frombuffer(row["learner_logprobs"], "<f4")[row["mask"]].astype(np.float64) for row in rows]
    loss, clipped, kl = _objective(stored, step, logprobs, np)
    count = sum(map(len, logprobs))
    return numbers | {"loss/policy": loss, "policy/clip_fraction": clipped / count, "policy/kl": kl / count}


def _from_weights(stored: Stored, step: int) -> dict[str, float]:
    """What a step's weights say of its rows, each passed through the model alone, in float64."""
    checkpoint = read_checkpoint(next(stored.folder.glob(f"checkpoints/*{step - 1:d}")))
    model = HybridModel(PRESETS[stored.config.policy.preset].override(stored.config.policy.overrides))
    load_numpy_tensors(model, checkpoint.tensors["weights"])
    banned = list(make_dialect(stored.config.policy).banned_token_ids)
    taken, entropies = [], []
    for row in _taught(stored, step):
        ids = torch.from_numpy(np.frombuffer(row["token_ids"], "<i4").astype(np.int64))
        logits = model(ids, torch.tensor([0, len(ids)])).logits[np.flatnonzero(row["mask"]) - 1].double()
        logits[:, banned] = -1e30
        logprobs = logits.log_softmax(-1)
        taken.append(logprobs.gather(1, ids[torch.from_numpy(row["mask"])][:, None])[:, 0])
        entropies.append(-(logprobs.exp() * logprobs).sum(-1).detach())
    _objective(stored, step, taken, torch)[0].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {
        "policy/entropy": float(torch.cat(entropies).mean()),
        "optim/grad_norm": float(sum(gradient.double().square().sum() for gradient in gradients) ** 0.5),
    }


def _off_policy(stored: Stored, step: int) -> dict[str, float]:
    rows = stored.trained(step)
    lags = [step - 1 - row["min_version"] for row in rows]
    versions = [np.frombuffer(row["policy_versions"], "<i4")[row["mask"]] for row in rows]
    scored = [(row, v) for row, v in zip(rows, versions, strict=True) if row["learner_logprobs"] is not None]
    sides = {who: [np.frombuffer(row[f"{who}_logprobs"], "<f4")[row["mask"]] for row, _ in scored]
             for who in ("learner", "rollout")}  # fmt: skip
    change = np.concatenate(sides["learner"]).astype(np.float64) - np.concatenate(sides["rollout"])
    token_lags, ratio = step - 1 - np.concatenate([v for _, v in scored]), np.exp(change)
    kl = ratio - 1 - change
    until_s = stored.window(step)[1]
    arrived = {g for t, event, g, _ in stored.ledger if event == "committed" and t <= until_s}
    sent = [row for row in stored.rows if row["group_id"] in arrived]
    taught = [row for row in stored.rows if row["step"] is not None and row["step"] <= step]
    columns = {"length": "num_sampled_tokens", "reward": "reward", "seconds": "seconds"}
    bias = {f"selection_bias/{name}": _mean(r[c] for r in taught) / _mean(r[c] for r in sent)
            for name, c in columns.items()}  # fmt: skip
    return bias | {
        "off_policy/lag/mean": _mean(lags),
        "off_policy/lag/max": max(lags),
        **{f"off_policy/lag/count/{lag}": n for lag, n in Counter(lags).items()},
        "off_policy/versions_per_trajectory": _mean(len(set(v.tolist())) for v in versions),
        "policy/mismatch_kl/mean": kl.mean(),
        "policy/mismatch_kl/max": kl.max(),
        **{f"policy/mismatch_kl/lag/{lag}": kl[token_lags == lag].mean() for lag in set(token_lags.tolist())},
        "policy/logprob_abs_diff/mean": np.abs(change).mean(),
        "policy/logprob_abs_diff/max": np.abs(change).max(),
        "policy/importance_ratio/mean": ratio.mean(),
        "policy/importance_ratio/max": ratio.max(),
        "policy/ess_ratio": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }


def _together_s(spans: list[dict], start_s: float, end_s: float) -> float:
    """Seconds of a window in which the learner waited and workers evaluated."""
    waits = [s for s in spans if (s["process"], s["activity"]) == ("learner", "wait")]
    evaluations = {(s["start_s"], s["end_s"]) for s in spans if s["activity"] == "evaluate"}  # of all workers at once
    return sum(
        max(0.0, min(wait["end_s"], until_s, end_s) - max(wait["start_s"], from_s, start_s))
        for wait in waits
        for from_s, until_s in evaluations
    )


def _throughput(stored: Stored, step: int) -> dict[str, float]:
    start_s, end_s = stored.window(step)
    wall_s, rows = end_s - start_s, stored.trained(step)
    spent = {name: seconds_by(stored.spans, "learner", name, start_s, end_s)
             for name in ("wait", "train", "sync", "checkpoint")}  # fmt: skip
    pushes = [s for s in stored.spans if s["process"] == "push" and s["end_s"] <= end_s]
    busy_s = stored.busy_s(start_s, end_s)
    return {
        "trainer/tok_s": sum(row["num_sampled_tokens"] for row in rows) / wall_s,
        "trainer/tokens": sum(row["num_sampled_tokens"] for row in _taught(stored, step)),
        "rollout/episodes_s": len(rows) / wall_s,
        "rollout/busy_s": busy_s,
        "time/rollout_idle_ratio": 1 - busy_s / wall_s,
        "time/trainer_idle_ratio": spent["wait"] / wall_s,
        "time/step": wall_s,
        "time/wait_for_batch": spent["wait"],
        "time/wait_for_evaluation": _together_s(stored.spans, start_s, end_s),
        "time/forward_backward": LEARNER_S,
        "time/sync": spent["sync"],
        "time/checkpoint": spent["checkpoint"],
        "time/train": spent["train"],
        "time/other": wall_s - spent["wait"] - spent["sync"] - spent["checkpoint"] - LEARNER_S,
        "weight_sync/latency_s": pushes[-1]["end_s"] - pushes[-1]["start_s"] if pushes else 0.0,
    }


def _queue(stored: Stored, step: int) -> dict[str, float]:
    end_s = stored.window(step)[1]
    states = stored.states(end_s).values()
    ready = [since_s for state, since_s in states if state == "committed"]
    return {
        "queue/ready_groups": len(ready),
        "queue/in_flight": sum(state in ("queued", "leased") for state, _ in states),
        "queue/oldest_age_s": end_s - min(ready) if ready else 0.0,
    }


def _episodes(stored: Stored, step: int) -> dict[str, float]:
    rows = stored.trained(step)
    calls = sum(row["meta"]["num_tool_calls"] for row in rows)
    needing = [row for row in rows if row["meta"]["needs_tool"]]
    idle = [row for row in rows if row["meta"]["needs_tool"] is False]
    status = Counter(row["cause"] or "trained" for row in rows)
    return {
        "episode/turns/mean": _mean(row["num_turns"] for row in rows),
        "episode/tokens/mean": _mean(row["num_tokens"] for row in rows),
        "tool/calls_mean": calls / len(rows),
        "tool/offered": _mean(row["meta"]["num_tools"] > 0 for row in rows),
        "tool/productivity": sum(row["reward"] == 1 for row in rows) / calls if calls else 0.0,
        "tool/error_ratio": sum(row["meta"].get("num_tool_errors", 0) for row in rows) / calls if calls else 0.0,
        "tool/overuse": _mean(row["meta"]["num_tool_calls"] > 0 for row in idle),
        "tool/underuse": _mean(row["meta"]["num_tool_calls"] == 0 and row["reward"] < 1 for row in needing),
        "tool/cost_share": 0.0,  # tools cost nothing in this run
        "rollout/episode_s/mean": _mean(row["seconds"] for row in rows),
        "rollout/env_s/mean": _mean(row["env_seconds"] for row in rows),
        **{f"stop/{why}": n / len(rows) for why, n in Counter(row["stop_reason"] for row in rows).items()},
        "env/error_ratio": _mean(row["stop_reason"] == "env_error" for row in rows),
        **{f"rows/{name}": n for name, n in status.items()},
    }


def _health(stored: Stored, step: int) -> dict[str, float]:
    end_s = stored.window(step)[1]
    kinds = Counter(event["kind"] for event in stored.happened if event["time_s"] <= end_s)
    skipped = {row["step"] for row in stored.rows if row["cause"].startswith("update skipped") and row["step"] <= step}
    return {
        "workers/healthy": len(stored.workers) - kinds["worker_lost"],
        "faults/restarts": kinds["worker_restarted"],
        "faults/redispatched": stored.count("released", end_s),
        "faults/dropped_groups": stored.count("dropped", end_s, but="zero_variance"),
        "monitor/non_finite": 0,  # every null of this run would be told below: each number is compared
        "monitor/dropped": sum(event["dropped"] for event in stored.happened if event["kind"] == "tracker"),
        "loss/nan_count": len(skipped),
    }


AREAS: tuple[Callable[[Stored, int], dict[str, float]], ...] = (
    _learning, _optimization, _off_policy, _throughput, _queue, _episodes, _health,
)  # fmt: skip
LATE = {"rollout/busy_s", "time/rollout_idle_ratio"}
"""Told by heartbeats, so as old as one may be."""


def _is_shown(key: str) -> bool:
    names = re.findall(r'"([a-z_0-9]+/[a-z_0-9/]*\*?)"', OVERVIEW.read_text())
    return any(key.startswith(name[:-1]) if name.endswith("*") else key == name for name in names)


# --- tests ------------------------------------------------------------------------------------------------------------


def test_every_metric_that_the_documentation_names_is_on_the_overview() -> None:
    names = [re.sub(r"<\w+>", "x", name) for name in table_names(DOCS / "runs.md", "Metrics")]
    assert [name for name in names if not _is_shown(name)] == [] and len(names) > 60


def test_every_number_of_every_step_on_the_overview_follows_from_stored_rows(stored: Stored) -> None:
    assert len(stored.steps) == 7
    for number, row in enumerate(stored.steps, start=1):
        wanted = {key: value for area in AREAS for key, value in area(stored, number).items()}
        shown = {key for key in row if _is_shown(key)}
        assert shown - set(wanted) == FROM_WEIGHTS & shown, "say above which rows a new number comes from"
        assert len(shown) > 50
        for key in sorted(shown & set(wanted)):
            slack = 2 * HEARTBEAT_S if key in LATE else 1e-6
            assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=slack), (number, key)


def test_entropy_and_gradient_follow_from_the_rows_and_the_weights_of_a_checkpoint(stored: Stored) -> None:
    after_a_checkpoint = [step for step in (4, 7) if _taught(stored, step)]
    assert after_a_checkpoint
    for step in after_a_checkpoint:
        for key, wanted in _from_weights(stored, step).items():
            assert wanted > 0 and stored.steps[step - 1][key] == pytest.approx(wanted, rel=1e-4), (step, key)


def test_the_share_of_routes_that_were_not_replayed_follows_from_stored_routes(tmp_path: Path, stored: Stored) -> None:
    words = ("policy=tiny_moe", "steps=2", "learner.loss.advantage=tests.rl.training:first_is_best")
    found = Stored(train_in_process(small_config(tmp_path, *words)).folder.path)
    for number, numbers in enumerate(found.steps, start=1):
        known = []
        for row in (row for row in found.trained(number) if row["learner_logprobs"] is not None):
            routes = np.frombuffer(row["routed_experts"], "<i2").reshape(json.loads(row["routed_shape"]))
            known += (routes[: np.flatnonzero(row["mask"])[-1]] >= 0).all(2).ravel().tolist()
        assert 0 < _mean(known) < 1, "the local engine tells routes of sampled tokens, not of prompts"
        assert numbers["moe/replay_fallback_ratio"] == pytest.approx(1 - _mean(known))
    assert _is_shown("moe/replay_fallback_ratio")
    assert not any("moe/replay_fallback_ratio" in row for row in stored.steps), "a dense model has no routes"


def test_the_page_s_newest_numbers_are_those_of_the_last_step_and_of_the_held_out_rows(stored: Stored) -> None:
    board = Dashboard(stored.folder.parent, Stop())
    told = {key["key"]: key["last"] for key in board.run(RunFolder(path=stored.folder), {})["keys"]}
    wanted = {key: value for area in AREAS for key, value in area(stored, len(stored.steps)).items()}
    for key in ("reward/mean", "trainer/tok_s", "queue/ready_groups", "time/trainer_idle_ratio", "workers/healthy"):
        assert told[key] == pytest.approx(wanted[key]), key
    for row in (row for row in stored.metrics if row["kind"] == "evaluation"):
        held_out = [r for r in stored.rows if r["split"] == "eval" and r["eval_step"] == row["step"]]
        share, n, z = _mean(r["reward"] >= 1 for r in held_out), len(held_out), 1.959964
        middle, width = share + z * z / (2 * n), z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5
        ends = [(middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)]
        assert n == 4 and row["eval/success"] == pytest.approx(share)
        assert [row["eval/ci95_low"], row["eval/ci95_high"]] == pytest.approx(ends)
    assert told["eval/success"] == row["eval/success"]


def test_the_time_of_each_step_is_accounted_for_within_two_percent(stored: Stored) -> None:
    for number, row in enumerate(stored.steps, start=1):
        start_s, end_s = stored.window(number)
        assert sum(row[f"time/{part}"] for part in PARTS) == pytest.approx(end_s - start_s, rel=0.02)
        scripted_s = LEARNER_S + SNAPSHOT_S + (SAVE_S if number in (3, 6) else 0.0)  # a snapshot each step
        told_s = row["time/forward_backward"] + row["time/sync"] + row["time/checkpoint"]
        assert told_s == pytest.approx(scripted_s, rel=0.02)
        assert row["time/other"] == pytest.approx(TRAIN_S - LEARNER_S, rel=0.02)  # the rest of the learner's call


def test_what_the_verdict_rests_on_is_made_of_seconds_of_spans_and_rows(stored: Stored) -> None:
    start_s, end_s = stored.window(1)[0], stored.window(len(stored.steps))[1]
    wall_s = end_s - start_s
    (verdict,) = [event for event in stored.happened if event["kind"] == "verdict"]
    per_step = [_throughput(stored, n) | _queue(stored, n) | _off_policy(stored, n) | _episodes(stored, n)
                for n in range(1, len(stored.steps) + 1)]  # fmt: skip

    def total(key: str) -> float:
        return sum(numbers[key] for numbers in per_step)

    assert verdict["num_steps"] == len(stored.steps)
    assert verdict["learner_idle"] + verdict["evaluation"] == pytest.approx(
        seconds_by(stored.spans, "learner", "wait", start_s, end_s) / wall_s
    )
    assert verdict["sync"] == pytest.approx(seconds_by(stored.spans, "learner", "sync", start_s, end_s) / wall_s)
    assert verdict["checkpoint"] == pytest.approx(total("time/checkpoint") / wall_s)
    assert verdict["other"] == pytest.approx(total("time/other") / wall_s)
    assert verdict["rollout_idle"] == pytest.approx(1 - stored.busy_s(start_s, end_s) / wall_s, abs=0.01)
    assert verdict["env_share"] == pytest.approx(total("rollout/env_s/mean") / total("rollout/episode_s/mean"))
    assert verdict["queue_age_s"] == pytest.approx(total("queue/oldest_age_s") / len(per_step))
    assert verdict["staleness"] == pytest.approx(total("off_policy/lag/mean") / len(per_step))


def test_the_script_had_its_faults_and_its_waits(stored: Stored) -> None:
    """Else the numbers above would agree on nothing much."""
    kinds = Counter(event for _, event, _, _ in stored.ledger)
    assert kinds["released"] == 2 and kinds["dropped"] == 1
    last = stored.steps[-1]
    assert last["faults/redispatched"] == 2 and last["faults/dropped_groups"] == 1
    assert any(row["time/wait_for_batch"] > 0 for row in stored.steps)
    assert any(row["queue/oldest_age_s"] > 0 for row in stored.steps)
    assert any(row["off_policy/lag/max"] == 1 for row in stored.steps)
