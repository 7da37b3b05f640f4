"""Settings that cannot be meant together, or that another setting switches off. Each is a sentence."""

from collections.abc import Iterator
from dataclasses import fields

from conf.keys import lookup
from conf.schema import (
    ClusterConfig,
    CurriculumConfig,
    EnvConfig,
    EvaluationConfig,
    MonitorConfig,
    PolicyConfig,
    TrainConfig,
    VllmConfig,
)

VLLM_ARGUMENTS = {
    "dtype": "engine.vllm.dtype",
    "kv_cache_memory_bytes": "engine.vllm.kv_cache_mib",
    "tensor_parallel_size": "engine.vllm.tensor_parallel",
    "distributed_executor_backend": "engine.vllm.tensor_parallel",
    "data_parallel_size": "rollout.workers",
    "kv_cache_dtype": "engine.vllm.kv_cache_dtype",
    "enable_prefix_caching": "engine.vllm.prefix_cache",
    "enforce_eager": "engine.vllm.enforce_eager",
    "weight_transfer_config": "engine.vllm.transport",
    "enable_return_routed_experts": "engine.vllm.routes",
    "max_model_len": "engine.max_model_tokens",
    "max_num_seqs": "engine.max_running",
    "model": "policy.path",
    "seed": "seed",
}
"""Argument of vLLM's -> the setting that decides it, so that `engine.vllm.extra` may not."""
VLLM_FIXED = {
    "async_scheduling": "a token must come from the weights that serve when it arrives",
    "generation_config": "each request says its whole sampling",
    "load_format": "weights come from the learner",
    "logprobs_mode": "the learner computes logprobs of one kind",
    "quantization": "weights that change while they load cannot be compared with the snapshot",
    "skip_tokenizer_init": "engines know tokens alone",
    "speculative_config": "an MTP layer or a draft model is not trained, so stale at once; n-gram lookup, which needs "
    "no weights, fails in vLLM 0.32's CPU build with these models and was not run on GPUs",
    "worker_extension_cls": "weights and routes pass through Shoal's own",
}
"""Argument of vLLM's -> why nothing may change it."""
VLLM_MIN_TEMPERATURE = 0.01
"""Beside 0. Of a lower one vLLM would make this, and say so in a log alone."""
FAILPOINT_PHASES = ("reset", "sample", "tool", "commit", "swap")


def combination_problems(config: TrainConfig) -> Iterator[str]:
    """Each pair or triple of settings that cannot be meant together, as a sentence."""
    policy, engine, rollout = config.policy, config.engine, config.rollout
    learner, cluster = config.learner, config.cluster
    if learner.publish_every > rollout.max_staleness + 1:
        yield (
            f"learner.publish_every={learner.publish_every} would deadlock: workers may only run "
            f"{rollout.max_staleness} steps behind, so weights must be pushed at least every "
            f"rollout.max_staleness + 1 = {rollout.max_staleness + 1} steps"
        )
    if learner.updates_per_step > rollout.groups_per_step:
        yield (
            f"learner.updates_per_step={learner.updates_per_step} needs at least as many groups a step, "
            f"and rollout.groups_per_step={rollout.groups_per_step}"
        )
    if engine.max_sessions < engine.max_running:
        yield (
            f"engine.max_sessions={engine.max_sessions} must be at least engine.max_running={engine.max_running}: "
            "running conversations count"
        )
    if rollout.max_turn_tokens >= engine.max_model_tokens:
        yield (
            f"rollout.max_turn_tokens={rollout.max_turn_tokens} leaves no room for a prompt: "
            f"it must be less than engine.max_model_tokens={engine.max_model_tokens}"
        )
    if engine.max_model_tokens > learner.micro_batch_tokens:
        yield (
            f"engine.max_model_tokens={engine.max_model_tokens} must be at most "
            f"learner.micro_batch_tokens={learner.micro_batch_tokens}: the longest trajectory is trained in one piece"
        )
    if cluster.stall_timeout_s <= rollout.episode_deadline_s:
        yield (
            f"cluster.stall_timeout_s={cluster.stall_timeout_s} must be more than "
            f"rollout.episode_deadline_s={rollout.episode_deadline_s}: a slow episode would pass for a stall"
        )
    if policy.kind == "hf" and not policy.path:
        yield "policy.kind=hf needs policy.path=DIR, a transformers checkpoint folder"
    if policy.kind == "hf" and policy.dialect == "tiny":
        yield "policy.dialect=tiny needs policy.kind=hybrid: a transformers checkpoint needs chat_template or qwen3_5"
    if policy.kind == "hybrid" and policy.dialect != "tiny":
        yield f"policy.dialect={policy.dialect} needs policy.kind=hf: the hybrid model has only the tiny tokenizer"
    if policy.kind == "hf" and policy.init == "random":
        yield "policy.init=random has no effect: policy.kind=hf brings its weights"
    yield from _vllm_problems(config)
    yield from _placement_problems(config)
    yield from _curriculum_problems(config)
    yield from _without_effect(config)
    for failpoint in filter(None, config.run.debug_failpoint.split(",")):
        phase, _, count = failpoint.partition(":")
        if phase not in FAILPOINT_PHASES or not count.isdecimal() or int(count) < 1:
            yield (
                f"run.debug_failpoint={config.run.debug_failpoint!r} must be <phase>:<count>, "
                f"phase one of {', '.join(FAILPOINT_PHASES)}, count at least 1"
            )


def _vllm_problems(config: TrainConfig) -> Iterator[str]:
    vllm = config.engine.vllm
    if config.engine.kind != "vllm":
        return  # `_without_effect` speaks of its settings
    for name in vllm.extra:
        if name in VLLM_ARGUMENTS:
            yield f"engine.vllm.extra.{name} is decided by {VLLM_ARGUMENTS[name]}: set that one"
        if name in VLLM_FIXED:
            yield f"engine.vllm.extra.{name} cannot be set: {VLLM_FIXED[name]}"
    temperatures = {"rollout": config.rollout.temperature, "evaluation": config.evaluation.temperature}
    for name, temperature in temperatures.items():
        if 0 < temperature < VLLM_MIN_TEMPERATURE:
            yield f"{name}.temperature={temperature:g} must be at least {VLLM_MIN_TEMPERATURE:g} with engine=vllm"
    if vllm.transport != "objects" and config.cluster.kind == "inprocess":
        yield f"engine.vllm.transport={vllm.transport} has no effect: cluster.kind=inprocess"


def _placement_problems(config: TrainConfig) -> Iterator[str]:
    cluster, workers = config.cluster, config.rollout.workers
    if cluster.worker_gpus > 1 and config.engine.kind == "local":
        yield f"cluster.worker_gpus={cluster.worker_gpus:g} must be at most 1: engine.kind=local computes on one GPU"
    devices = config.engine.vllm.tensor_parallel
    if config.engine.kind == "vllm" and cluster.worker_gpus and max(1, cluster.worker_gpus) != devices:
        yield (
            f"cluster.worker_gpus={cluster.worker_gpus:g} must be engine.vllm.tensor_parallel = {devices}"
            + (", or a share of one GPU" if devices == 1 else "")
        )
    if cluster.worker_gpus > 1 and cluster.worker_gpus % 1:
        yield f"cluster.worker_gpus={cluster.worker_gpus:g} must be a whole number, or less than 1: a share of one GPU"
    total = cluster.learner_gpus + workers * cluster.worker_gpus
    if cluster.layout == "shared" and not (cluster.learner_gpus and cluster.worker_gpus and total <= 1 + 1e-9):
        yield (
            "cluster.layout=shared puts the learner and all workers on one GPU: cluster.learner_gpus and "
            "cluster.worker_gpus must both be more than 0, and learner_gpus + rollout.workers * worker_gpus, here "
            f"{cluster.learner_gpus:g} + {workers} * {cluster.worker_gpus:g} = {total:g}, at most 1"
        )


def _curriculum_problems(config: TrainConfig) -> Iterator[str]:
    curriculum = config.curriculum
    low, high = curriculum.min_level, curriculum.max_level
    if low > high:
        yield f"curriculum.min_level={low} must be at most curriculum.max_level={high}"
    if curriculum.demote >= curriculum.promote:
        yield f"curriculum.demote={curriculum.demote} must be less than curriculum.promote={curriculum.promote}"
    if curriculum.sampler == "levels":
        starts = {f"env.mix.{name}.level": entry.level for name, entry in config.env.mix.items()}
        for key, level in (starts or {"env.level": config.env.level}).items():
            if level > high:
                yield f"{key}={level}, where the curriculum begins, must be at most curriculum.max_level={high}"


def _without_effect(config: TrainConfig) -> Iterator[str]:
    """Settings that differ from their default although another setting switches them off.

    Not refused: rollout.lock with max_staleness=0, so that a synchronous and an asynchronous run differ in one word.
    """
    sampler, rises = config.curriculum.sampler, config.curriculum.sampler == "levels"
    never = f"curriculum.sampler={sampler} does not change the level"
    for off, section, defaults, names, why in (
        (sampler == "uniform", "env", EnvConfig(), ("level",), "curriculum.sampler=uniform draws all levels"),
        (config.env.tool_cost == 0, "env", EnvConfig(), ("tool_cost_below",), "env.tool_cost=0"),
        (not rises, "curriculum", CurriculumConfig(), ("window", "promote", "demote", "probe", "floor"), never),
        (not rises and sampler != "uniform", "curriculum", CurriculumConfig(), ("min_level", "max_level"), never),
        (sampler != "pool", "curriculum", CurriculumConfig(), ("pool_size",), f"curriculum.sampler={sampler}"),
        (config.curriculum.gate == "none", "curriculum", CurriculumConfig(), ("max_refill",), "curriculum.gate=none"),
        (bool(config.env.mix), "env", EnvConfig(), ("id", "level", "kwargs"), "env.mix is set: set it on its entries"),
        (config.policy.kind == "hf", "policy", PolicyConfig(), ("preset", "overrides"), "policy.kind=hf"),
        (config.policy.kind == "hybrid", "policy", PolicyConfig(), ("path",), "policy.kind=hybrid"),
        (
            config.engine.kind != "vllm",
            "engine.vllm",
            VllmConfig(),
            tuple(item.name for item in fields(VllmConfig)),
            f"engine.kind={config.engine.kind}",
        ),
        (config.evaluation.every == 0, "evaluation", EvaluationConfig(), ("tasks",), "evaluation.every=0"),
        (
            config.cluster.kind == "inprocess",
            "cluster",
            ClusterConfig(),
            ("address", "num_cpus", "learner_gpus", "worker_gpus", "layout", "strategy"),
            "cluster.kind=inprocess",
        ),
        (config.cluster.address != "local", "cluster", ClusterConfig(), ("num_cpus",), "cluster.address is not local"),
        (
            config.monitor.wandb == "disabled",
            "monitor",
            MonitorConfig(),
            ("wandb_project", "upload_checkpoints"),
            "monitor.wandb=disabled",
        ),
    ):
        for name in names:
            value = lookup(config, f"{section}.{name}")
            if off and value != getattr(defaults, name):
                yield f"{section}.{name}={value!r} has no effect: {why}"
