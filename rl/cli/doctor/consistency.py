"""`shoal doctor --engine E --policy P`: how far the engine's logprobs are from those of the learner, measured here.

Real episodes of the configured environment are sampled by the engine as in training and scored by the learner as in
training: under the first weights, after an update, with and without replayed routes, and with the learner's weights
rounded as the engine's are. For a prefix cache, whose blocks are longer than many an episode, the first turns of the
same episodes are sampled once more after a long text that all of them share.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from conf.loading import load_config
from conf.schema import TrainConfig
from envs.tasks.task_source import held_out_tasks
from policy.engine.protocol import Completion, GenerationRequest, SamplingSpec
from policy.model.checkpoint_io import load_numpy_tensors
from policy.sync.snapshot import PolicySnapshot
from policy.vllm.packages import vllm_build
from rl.algorithm.batch import pack
from rl.algorithm.gradient import score_rows
from rl.algorithm.learner import Learner
from rl.cli.doctor.doctor import FAILED
from rl.cluster.inprocess import build_pool
from rl.cluster.learner_service import build_learner
from rl.loop.preflight import check_parts
from rl.loop.tasks import task_entries
from rl.monitor.progress import plain_console
from rollout.dialects.dialect import make_dialect
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import Trajectory
from rollout.worker import build_engine, build_worker

EPISODES = 32
UPDATE_SIZE = 0.05
"""Relative size of the noise that the update adds to every weight: ten times that of a large step of AdamW."""
LONG_TOKENS = 1024
"""Least length of a conversation for the prefix cache: blocks of hybrid models have 256 tokens on a CPU."""
SAMPLE_S = 600.0
"""Deadline of the start of an engine and its episodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """|engine logprob - learner logprob| over sampled tokens."""

    name: str
    mean: float
    max: float
    tokens: int
    judged: bool
    """Training would meet it: it must be within the bound."""
    cached_tokens: int | None = None
    """Prompt tokens that the engine took out of its prefix cache; None where it was asked for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `shoal doctor --engine` prints."""

    engine: str
    policy: str
    episodes: int
    turns: float
    """Mean of an episode."""
    bound: float
    """`learner.self_check_tolerance`, or what the engine declares."""
    gaps: tuple[Gap, ...]

    @property
    def ok(self) -> bool:
        return all(gap.max <= self.bound for gap in self.gaps if gap.judged)


def main(engine: str, policy: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> int:
    """0, or `FAILED` where the two differ more than training allows. Raises `ConfigError` for what cannot run here."""
    config = load_config([f"engine={engine}", f"policy={policy}", "cluster=inprocess", *overrides])
    check_parts(config)
    report = asyncio.run(measure(config, policy=policy))
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}))
    else:
        plain_console().print(report_text(report), highlight=False)
    return 0 if report.ok else FAILED


async def measure(config: TrainConfig, *, policy: str = "", episodes: int = EPISODES) -> Report:
    """Start the engine, with vLLM once more with a prefix cache, and compare; each start has a deadline."""
    learner = build_learner(config)
    first, second = learner.snapshot(), updated(learner.snapshot())
    before, after = await sample(config, (first, second), episodes)
    gaps = compare(learner, "first weights", before)
    if config.engine.kind == "vllm":
        cached = replace(config, engine=replace(config.engine, vllm=replace(config.engine.vllm, prefix_cache=True)))
        again, reused = await sample_after_a_shared_text(cached, first, before)
        gaps += compare(learner, "first weights, prefix cache", again, cached_tokens=reused)
        load_numpy_tensors(learner.model, in_bfloat16(first))
        gaps += compare(learner, "first weights, the learner's rounded to bfloat16", before, judged=False)
    load_numpy_tensors(learner.model, second.tensors)
    gaps += compare(learner, "after an update", after)
    return Report(
        engine=config.engine.kind,
        policy=policy,
        episodes=len(before),
        turns=sum(t.num_turns for t in before) / len(before),
        bound=learner.tolerance,
        gaps=tuple(gaps),
    )


def updated(snapshot: PolicySnapshot) -> PolicySnapshot:
    """The next version: every weight moved by noise, as no training would move it so soon."""
    rng = np.random.default_rng(0)
    tensors = {
        name: (weights * (1 + UPDATE_SIZE * rng.standard_normal(weights.shape))).astype(weights.dtype)
        for name, weights in snapshot.tensors.items()
    }
    return PolicySnapshot.create(snapshot.version + 1, tensors)


async def sample(
    config: TrainConfig, snapshots: Sequence[PolicySnapshot], episodes: int
) -> tuple[list[Trajectory], ...]:
    """For each snapshot, in turn, the same problems played by one engine.

    Raises TimeoutError past `SAMPLE_S`, RuntimeError where no episode succeeded in being played.
    """
    temperature = config.rollout.temperature
    host = build_pool(config)
    tasks = await held_out_tasks(task_entries(config), host, count=episodes, seed=config.evaluation.seed)
    worker = build_worker(config, "doctor", host)
    try:
        async with asyncio.timeout(SAMPLE_S):
            found = []
            for snapshot in snapshots:
                await worker.load_weights(snapshot)
                played = await worker.evaluate(list(tasks.values()), temperature, f"doctor/{snapshot.version}")
                good = [t for t in played if not t.stop_reason.is_error and t.num_sampled_tokens]
                if not good:
                    raise RuntimeError(f"none of {episodes} episodes could be played; the first: {played[0].error}")
                found.append(good)
            return tuple(found)
    finally:
        await worker.close()


async def sample_after_a_shared_text(
    config: TrainConfig, snapshot: PolicySnapshot, played: Sequence[Trajectory]
) -> tuple[list[Trajectory], int]:
    """The first turns of `played` sampled anew, each after the same text, and how many prompt tokens came out of the
    engine's cache. The text is made of the episodes themselves.

    Raises TimeoutError past `SAMPLE_S`.
    """
    longest = max(LONG_TOKENS, config.engine.max_model_tokens)
    engine = build_engine(replace(config, engine=replace(config.engine, max_model_tokens=longest)))
    dialect = make_dialect(config.policy)
    spec = SamplingSpec(
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_turn_tokens,
        stop_token_ids=dialect.stop_token_ids,
        banned_token_ids=dialect.banned_token_ids,
    )
    prompts = [t.token_ids[: int(t.loss_mask.argmax())] for t in played]
    room = longest - config.rollout.max_turn_tokens - max(map(len, prompts))
    shared = np.resize(np.concatenate([t.token_ids for t in played]), max(1, min(longest // 2, room)))

    async def ask(name: str, prompt: np.ndarray, spec: SamplingSpec) -> Completion:
        request = GenerationRequest(request_id=name, prompt_ids=prompt, sampling=spec, deadline_s=SAMPLE_S)
        return await engine.generate(request)

    async def one(i: int) -> tuple[Trajectory, int]:
        record = TokenRecord()
        record.append_given(np.concatenate([shared, prompts[i]]).tolist())
        completion = await ask(str(i), record.token_ids, spec)
        record.append_sampled(completion)
        sampled = replace(
            played[i],
            token_ids=record.token_ids,
            loss_mask=record.loss_mask,
            rollout_logprobs=record.logprobs,
            policy_versions=record.policy_versions,
            routed_experts=record.routed_experts,
        )
        return sampled, completion.cached_tokens

    try:
        async with asyncio.timeout(SAMPLE_S):
            await engine.load_weights(snapshot)
            await ask("shared", shared, replace(spec, max_tokens=1))
            found = await asyncio.gather(*map(one, range(len(played))))
    finally:
        await engine.close()
    return [t for t, _ in found], sum(cached for _, cached in found)


def in_bfloat16(snapshot: PolicySnapshot) -> dict[str, np.ndarray]:
    """The weights as an engine of bfloat16 holds them. What is left of a gap with these is arithmetic."""
    return {
        name: torch.from_numpy(weights).to(torch.bfloat16).float().numpy() for name, weights in snapshot.tensors.items()
    }


def compare(
    learner: Learner,
    name: str,
    trajectories: Sequence[Trajectory],
    *,
    judged: bool = True,
    cached_tokens: int | None = None,
) -> list[Gap]:
    """Of experts two rows: with the engine's routes, as training does it, and with the learner's own."""
    if all(t.routed_experts is None for t in trajectories):
        return [replace(gap(learner, name, trajectories, judged=judged), cached_tokens=cached_tokens)]
    own = [replace(t, routed_experts=None) for t in trajectories]
    gaps = [
        gap(learner, f"{name}, routes replayed", trajectories, judged=judged),
        gap(learner, f"{name}, routes not replayed", own, judged=False),
    ]
    return [replace(each, cached_tokens=cached_tokens) for each in gaps]


def gap(learner: Learner, name: str, trajectories: Sequence[Trajectory], *, judged: bool) -> Gap:
    packs = pack(trajectories, max_tokens=learner.config.micro_batch_tokens, device=learner.model.device)
    scores = score_rows(learner.model, packs, learner.banned_token_ids)
    recorded = [t.rollout_logprobs[t.loss_mask == 1] for t in trajectories]
    differences = np.concatenate([np.abs(scores[i] - logprobs) for i, logprobs in enumerate(recorded)])
    return Gap(
        name=name, mean=float(differences.mean()), max=float(differences.max()), tokens=len(differences), judged=judged
    )


def report_text(report: Report) -> str:
    width = max(len(gap.name) for gap in report.gaps)
    lines = [
        f"|logprob of engine={report.engine} - logprob of the learner|, policy={report.policy}: "
        f"{report.episodes} episodes of {report.turns:.1f} turns",
        f"{'':<{width}}  {'mean':>9}  {'largest':>9}  {'tokens':>7}",
    ]
    for gap in report.gaps:
        verdict = "" if not gap.judged else "  ok" if gap.max <= report.bound else "  FAIL"
        if gap.judged and gap.cached_tokens is not None:
            verdict += f", {gap.cached_tokens or 'no'} prompt tokens came out of the cache"
        lines.append(f"{gap.name:<{width}}  {gap.mean:>9.2g}  {gap.max:>9.2g}  {gap.tokens:>7}{verdict}")
    lines += _remarks(report)
    if report.ok:
        lines.append(f"within the bound of {report.bound:g}: training starts")
    else:
        lines.append(
            f"beyond the bound of {report.bound:g}: the first step of a training would refuse it. Find the cause, or "
            "set learner.self_check_tolerance"
        )
    return "\n".join(lines)


def _remarks(report: Report) -> Iterator[str]:
    """What the rows do not say of themselves."""
    if not all(gap.judged for gap in report.gaps):
        yield "rows without a verdict are for comparison: training replays routes, and its learner is not rounded"
    routes = any(gap.name.endswith("routes replayed") for gap in report.gaps)
    if routes and report.engine == "vllm" and vllm_build() == "gpu":
        yield "on GPUs the prefix cache is on in every row: vLLM returns no routes of experts without it"
