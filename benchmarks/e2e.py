"""Shoal against TRL 1.16's GRPOTrainer: the same model, tasks, tool latency, batch and learning rate on one machine.

    shoal bench e2e [--json] [--pairs 2] [--trl-python PATH] [--checkpoint DIR]

`tool`: sums by calls of a slow tool (lognormal, median 150 ms). `reverse`: one short turn, no tool. Both sides start
from one warm-started checkpoint and train on 8 prompts x 8 completions a step with AdamW at a constant rate, clip 0.2
and group-normalised advantages; they see the same tokens (asserted), and take turns. What is missing is made in peers/
of the checkout: TRL's own virtual environment, and the checkpoint (minutes).

Steady rates count trajectories from the end of step 1 to the end of the last, as benchmarks/peers/meter.py does.
Rewards are means over trajectories; their interval takes each step's mean (8 problems) as one observation.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.peers.meter import Meter
from benchmarks.stored_result import save_result

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPTS = CHECKOUT / "benchmarks" / "peers"
PEERS = CHECKOUT / "peers"
RESULT = CHECKOUT / "benchmarks" / "results" / "e2e.json"
TORCH = "torch==2.13.0"
TRL = ("trl==1.16.0", "transformers==5.23.0", "accelerate", "datasets", "numpy")
TRL_THREADS = 2
GROUPS, GROUP_SIZE = 8, 8
LEARNING_RATE = 5e-4
MAX_STALENESS = 2
PROMPT_TOKENS = 20
"""Most tokens of a prompt (`check_tokens` asserts it). Shoal bounds a conversation, TRL what follows its prompt."""
SIDE_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.1
RATIOS = {"speedup_over_trl": "tool", "speedup_over_trl_reverse": "reverse"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTask:
    """One task of benchmarks/peers/task.py and how long each side trains on it."""

    name: str
    env: str
    """Its class in benchmarks/peers/shoal_env.py."""
    max_new_tokens: int
    trl_steps: int
    shoal_steps: int

    @property
    def env_id(self) -> str:
        return f"benchmarks.peers.shoal_env:{self.env}-v0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What one side did."""

    side: str
    seed: int
    step_end_s: list[float]
    """One per step, on the side's own clock."""
    rewards: list[float]
    """One per step: the mean over its trajectories."""
    trained_tokens_per_second: float
    """Sampled tokens of trained trajectories, in the steady window."""
    trajectories_per_cpu_second: float
    """In the steady window; counts every process of the side."""
    tool_calls: float
    """Mean per trajectory."""
    load: float
    """Of the machine, before it began."""

    def rate(self, first: int = 1) -> float:
        """Trajectories per second from the end of step `first` (1, 2, ...) to the end of the last."""
        seconds = self.step_end_s[-1] - self.step_end_s[first - 1]
        return (len(self.step_end_s) - first) * GROUPS * GROUP_SIZE / seconds


# --- what both sides need -------------------------------------------------------------------------------------------


def make_trl_environment(folder: Path, torch_index: str) -> Path:
    """A virtual environment with TRL, made once. Returns its Python."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        say(f"making {folder}: {TORCH} {' '.join(TRL)}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraint = folder / "constraint.txt"
        constraint.write_text(TORCH + "\n")
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH, *(["--index-url", torch_index] if torch_index else [])], check=True)
        subprocess.run([*install, "-c", constraint, *TRL], check=True)
        done.touch()
    return python


def make_checkpoint(folder: Path, python: Path) -> Path:
    """The warm-started hybrid model, made once; deterministic on one machine."""
    if not (folder / "config.json").exists():
        say(f"making {folder}: a supervised warm start, some minutes")
        partial = folder.with_name(folder.name + ".partial")
        words = [partial, "--sft-steps", "500", "--stop", "340", "--threads", "1"]
        subprocess.run([python, SCRIPTS / "task.py", *words], check=True, cwd=CHECKOUT)
        partial.rename(folder)
    return folder


def check_tokens(task: SharedTask, python: Path, checkpoint: Path) -> None:
    """Raise `AssertionError` unless both sides show the policy the same tokens, tool results included."""
    conversations, ours = our_tokens(task, checkpoint)
    answer = subprocess.run(
        [python, SCRIPTS / "prompts.py", checkpoint],
        input=json.dumps(conversations),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=SIDE_TIMEOUT_S,
    )
    theirs = json.loads(answer.stdout.splitlines()[-1])
    different = [c["messages"] for c, a, b in zip(conversations, ours, theirs, strict=True) if a != b]
    assert not different, f"{len(different)} conversations differ in their tokens, the first: {different[0]}"


def our_tokens(task: SharedTask, checkpoint: Path) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Conversations as chat templates read them, up to where the policy speaks, and their tokens on Shoal's side."""
    from conf.schema import PolicyConfig
    from envs.base import call
    from envs.message import Message, ToolResult
    from envs.registry import make_env
    from rollout.dialects.dialect import make_dialect

    dialect = make_dialect(PolicyConfig(kind="hf", path=str(checkpoint), dialect="chat_template"))
    env = make_env(task.env_id)
    conversations, token_ids = [], []
    for seed in range(50):
        opening, info = env.reset(seed=seed)
        tools = info["tools"]
        messages: list[dict[str, Any]] = [{"role": "user", "content": opening[0].text}]
        ids = dialect.prompt(opening, tools)
        assert len(ids) <= PROMPT_TOKENS, f"a prompt of {len(ids)} tokens: {opening[0].text!r}"
        if tools:
            function = {"name": "add", "arguments": {"a": seed, "b": 3}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"function": function}]})
            messages.append({"role": "tool", "name": "add", "content": str(seed + 3)})
            result = ToolResult(call_id="0", name="add", content=str(seed + 3))
            ids += dialect.completion(call("add", a=seed, b=3), tools) + dialect.reply([Message.tool(result)], tools)
        conversations.append({"task": task.name, "messages": messages})
        token_ids.append(ids)
    env.close()
    return conversations, token_ids


# --- the sides ------------------------------------------------------------------------------------------------------


def train_trl(task: SharedTask, *, python: Path, checkpoint: Path, seed: int, latency: float, folder: Path) -> Training:
    """GRPOTrainer as benchmarks/peers/trl_sync.py sets it up, with both cores."""
    output = folder / "result.jsonl"
    words = {
        "model": checkpoint, "task": task.name, "steps": task.trl_steps, "prompts": GROUPS, "group": GROUP_SIZE,
        "lr": LEARNING_RATE, "latency": latency, "max-new": task.max_new_tokens, "threads": TRL_THREADS, "seed": seed,
    }  # fmt: skip
    command = [python, SCRIPTS / "trl_sync.py", *(w for key, value in words.items() for w in (f"--{key}", value))]
    load = os.getloadavg()[0]
    run(command, folder / "log", environment={"BENCH_OUT": str(output)})
    result = json.loads(output.read_text())
    return Training(
        side="trl",
        seed=seed,
        step_end_s=[end for end, _ in result["curve"]],
        rewards=[reward for _, reward in result["curve"]],
        trained_tokens_per_second=result["steady_tok_per_s"],
        trajectories_per_cpu_second=result["steady_traj_per_cpu_s"],
        tool_calls=result["env_calls"] / result["traj"],
        load=load,
    )


def shoal_words(task: SharedTask, *, checkpoint: Path, seed: int, latency: float) -> list[str]:
    """The config that does on Shoal's side what benchmarks/peers/trl_sync.py does on the other."""
    tokens = task.max_new_tokens
    return [
        *("policy=hf", f"policy.path={checkpoint}", f"seed={seed}", f"steps={task.shoal_steps}"),
        *("env=custom", f"env.name={task.name}", f"env.id={task.env_id}"),
        *([f"env.kwargs.latency={latency}"] if task.name == "tool" else []),
        *(f"rollout.groups_per_step={GROUPS}", f"rollout.group_size={GROUP_SIZE}"),
        *(f"rollout.max_turn_tokens={tokens}", f"engine.max_model_tokens={PROMPT_TOKENS + tokens}"),
        f"rollout.max_staleness={MAX_STALENESS}",
        # what TRL takes by default: torch's betas, no warm-up, the same clip on both sides
        *(f"learner.optimizer.lr={LEARNING_RATE}", "learner.optimizer.warmup_steps=0", "learner.optimizer.beta2=0.999"),
        *("learner.loss.clip_low=0.2", "learner.loss.clip_high=0.2"),
        *("evaluation.every=0", "evaluation.final_tasks=1", "run.checkpoint_every=100000"),
        *("monitor.wandb=disabled", "monitor.progress=false"),
    ]


def train_shoal(task: SharedTask, *, checkpoint: Path, seed: int, latency: float, folder: Path) -> Training:
    """`shoal train`, its actors on a Ray of their own."""
    words = shoal_words(task, checkpoint=checkpoint, seed=seed, latency=latency)
    metrics = folder / "latest" / "metrics.jsonl"
    cpu: dict[int, float] = {}
    meter = Meter("shoal")

    def watch() -> None:
        cpu.setdefault(len(step_rows(metrics)), meter._cpu())

    load = os.getloadavg()[0]
    run([sys.executable, "-m", "rl.cli", "train", *words, f"run.root={folder}"], folder / "log", meanwhile=watch)
    rows = step_rows(metrics)
    steady_s = rows[-1]["time_s"] - rows[0]["time_s"]
    seen = sorted(cpu.keys() - {0})
    return Training(
        side="shoal",
        seed=seed,
        step_end_s=[row["time_s"] for row in rows],
        rewards=[row["reward/mean"] for row in rows],
        trained_tokens_per_second=sum(row["trainer/tok_s"] * row["time/step"] for row in rows[1:]) / steady_s,
        trajectories_per_cpu_second=(seen[-1] - seen[0]) * GROUPS * GROUP_SIZE / (cpu[seen[-1]] - cpu[seen[0]]),
        tool_calls=statistics.fmean(row["tool/calls_mean"] for row in rows),
        load=load,
    )


def step_rows(metrics: Path) -> list[dict[str, Any]]:
    """The finished steps of a run, while it goes on or afterwards."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "step"]


def run(
    command: Sequence[object],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run to the end, output to a file, `meanwhile` called every 0.1 s. Raises with the file's end where it fails."""
    words = [str(word) for word in command]
    until_s = time.monotonic() + SIDE_TIMEOUT_S
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, cwd=CHECKOUT, env={**os.environ, **(environment or {})}
        )
        try:
            while process.poll() is None and time.monotonic() < until_s:
                meanwhile()
                time.sleep(POLL_S)
        finally:
            stop(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Nothing where it has ended. A training that is told to stop ends its own processes first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


# --- comparing ------------------------------------------------------------------------------------------------------


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean of `ours` minus mean of `theirs` with its 95% interval (Welch's t; a, b the squared standard errors).

    Degrees of freedom (a + b)^2 / (a^2 / (n - 1) + b^2 / (m - 1)); the quantile of t is the normal one expanded in
    1 / degrees (Abramowitz and Stegun 26.7.5), 0.2% off at 5.
    """
    a, b = (statistics.variance(sample) / len(sample) for sample in (ours, theirs))
    middle = statistics.fmean(ours) - statistics.fmean(theirs)
    degrees = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1)) if a + b else math.inf
    z = statistics.NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    half = t * math.sqrt(a + b)
    return {"mean": round(middle, 4), "low": round(middle - half, 4), "high": round(middle + half, 4)}


def compare(trl: Sequence[Training], shoal: Sequence[Training]) -> dict[str, Any]:
    """Figures of one task; the n-th trainings of both sides are a pair."""
    first = len(trl[0].rewards)
    theirs = [reward for run in trl for reward in run.rewards]
    ours = [reward for run in shoal for reward in run.rewards]
    early = [reward for run in shoal for reward in run.rewards[:first]]

    def both(value: Callable[[Training], float]) -> dict[str, list[float]]:
        return {name: [round(value(run), 3) for run in runs] for name, runs in (("trl", trl), ("shoal", shoal))}

    return {
        "speedup_per_pair": [round(b.rate() / a.rate(), 3) for a, b in zip(trl, shoal, strict=True)],
        "trajectories_per_second": both(Training.rate),
        # some trajectories of the first S + 1 steps were under way before step 1 ended: without them
        "shoal_trajectories_per_second_later": [round(run.rate(MAX_STALENESS + 2), 3) for run in shoal],
        "trajectories_per_cpu_second": both(lambda run: run.trajectories_per_cpu_second),
        "trained_tokens_per_second": both(lambda run: run.trained_tokens_per_second),
        "tool_calls_per_trajectory": both(lambda run: run.tool_calls),
        "reward": {"trl": round(statistics.fmean(theirs), 4), "shoal": round(statistics.fmean(ours), 4)},
        "reward_difference": difference(ours, theirs),
        "reward_difference_first_steps": {"steps": first, **difference(early, theirs)},
        "trainings": [asdict(run) for pair in zip(trl, shoal, strict=True) for run in pair],
    }


def measure(task: SharedTask, *, pairs: int, python: Path, checkpoint: Path, latency: float) -> dict[str, Any]:
    """Train in turns: TRL, Shoal, TRL, Shoal, ..."""
    check_tokens(task, python, checkpoint)
    trl: list[Training] = []
    shoal: list[Training] = []
    for seed in range(1, pairs + 1):
        common: dict[str, Any] = {"checkpoint": checkpoint, "seed": seed, "latency": latency}
        with tempfile.TemporaryDirectory() as folder:
            trl.append(train_trl(task, python=python, folder=Path(folder), **common))
        with tempfile.TemporaryDirectory() as folder:
            shoal.append(train_shoal(task, folder=Path(folder), **common))
        rates = f"TRL {trl[-1].rate():.1f}, Shoal {shoal[-1].rate():.1f} trajectories/s"
        say(f"{task.name}, pair {seed}: {rates} (load before {trl[-1].load:.1f}, {shoal[-1].load:.1f})")
    return compare(trl, shoal)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(result: Mapping[str, Any]) -> None:
    """What a person wants to know of a result."""
    for name, task in RATIOS.items():
        found = result["figures"][task]
        gap, early = found["reward_difference"], found["reward_difference_first_steps"]
        print(f"{task}: {result['ratios'][name]:.2f}x TRL's trajectories/s; {found['trajectories_per_second']}")
        print(
            f"  reward {found['reward']}, difference {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}); "
            f"first {early['steps']} steps {early['mean']:+.3f} ({early['low']:+.3f} to {early['high']:+.3f})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24, help="Shoal's steps of the tool task")
    parser.add_argument("--trl-steps", type=int, default=5, help="TRL's steps of the tool task, half a minute each")
    parser.add_argument("--latency", type=float, default=1.0, help="scale of the tool's latency; 0 = off")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment that has TRL already")
    parser.add_argument("--torch-index", default="", help="index that torch is installed from in a new environment")
    parser.add_argument("--checkpoint", type=Path, help="the warm-started model, if it is made already")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if min(args.steps, args.trl_steps) < MAX_STALENESS + 3:
        parser.error(f"--steps and --trl-steps must be at least {MAX_STALENESS + 3}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the side that runs is stopped too

    python = (args.trl_python or make_trl_environment(PEERS / "trl", args.torch_index)).absolute()
    checkpoint = (args.checkpoint or make_checkpoint(PEERS / "mh", python)).absolute()
    tasks = (
        SharedTask(name="tool", env="SumTool", max_new_tokens=220, trl_steps=args.trl_steps, shoal_steps=args.steps),
        SharedTask(name="reverse", env="Reverse", max_new_tokens=12, trl_steps=25, shoal_steps=25),
    )
    figures: dict[str, Any] = {"pairs": args.pairs, "latency": args.latency, "trl_threads": TRL_THREADS}
    for task in tasks:
        figures[task.name] = measure(task, pairs=args.pairs, python=python, checkpoint=checkpoint, latency=args.latency)
    ratios = {name: round(statistics.median(figures[task]["speedup_per_pair"]), 3) for name, task in RATIOS.items()}
    result = {"name": "e2e", "ratios": ratios, "figures": figures, "machine": describe_machine(), "paired": True}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = save_result(args.output, result)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
