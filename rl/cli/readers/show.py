"""`shoal ls` and `shoal show`: what run folders hold, for people and as JSON.

Whatever a model or an environment wrote is hostile text: it is printed without markup and with control characters made
visible, so that it can neither colour nor rewrite a terminal.
"""

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.keys import leaf_keys, lookup
from conf.schema import TrainConfig
from envs.message import Message
from rl.cli.readers.sweep_list import sweep_places, sweep_table, sweeps_of
from rl.monitor.alerts import active_alerts
from rl.monitor.json_lines import read_json_lines
from rl.monitor.progress import duration, plain_console, sparkline, visible
from rl.monitor.verdict import judge, settings_of_config
from rl.runs import run_folder
from rl.runs.notes import Notes, read_notes
from rl.runs.run_folder import RunFolder, RunFolderError, RunSummary
from rl.runs.transcript import message_text
from rl.runs.usage import UsageError, resolve_run
from rollout.record.lineage import LineageEvent, read_lineage, story
from rollout.record.recorder import StoredTrajectory, TrajectoryReader
from rollout.record.trajectory import Trajectory

ROLE_STYLES = {"system": "dim", "user": "bold", "assistant": "cyan", "tool": "green"}
LAST_METRICS = (
    "reward/mean",
    "off_policy/lag/mean",
    "off_policy/lag/max",
    "policy/entropy",
    "policy/mismatch_kl/mean",
    "optim/grad_norm",
    "trainer/tok_s",
    "time/trainer_idle_ratio",
    "env/error_ratio",
    "faults/restarts",
)
"""What `show` prints of the last step; `--json` gives all."""


def list_runs(root: str, *, tags: Sequence[str] = (), text: str = "", as_json: bool = False) -> int:
    """Runs, newest first, then their sweeps; those that have every tag and, in name or note, the text."""
    every = run_folder.list_runs(root)
    notes = {run.name: read_notes(run.path) for run in every}
    runs = [
        run
        for run in every
        if set(tags) <= set(notes[run.name].tags) and text.lower() in f"{run.name}\n{notes[run.name].note}".lower()
    ]
    places = sweep_places(runs)
    if as_json:
        rows = [
            {
                "run": run.name,
                "status": run.state.status if run.state else "unreadable",
                "step": run.state.step if run.state else None,
                "started_s": run.state.started_s if run.state else None,
                "error": run.state.error if run.state else run.fault,
                "summary": run.summary,
                "note": notes[run.name].note,
                "tags": notes[run.name].tags,
                "sweep": places.get(run.name),
            }
            for run in runs
        ]
        print(json.dumps({"runs": rows, "sweeps": sweeps_of(places)}))
        return 0
    if every and not runs:
        print(f"none of the {len(every)} runs in {root}/ fits")
        return 0
    if not runs:
        print(f"no runs in {root}/ yet: shoal train env=calculator makes one")
        return 0
    plain_console().print(_run_table(runs, notes))
    if places:
        print()
        plain_console().print(sweep_table(sweeps_of(places)))
    return 0


def _run_table(runs: Sequence[RunSummary], notes: Mapping[str, Notes]) -> Table:
    noted = any(notes[run.name] != Notes() for run in runs)
    table = Table("run", "status", "step", "success", "started", *(["tags", "note"] if noted else []), box=None)
    for run in runs:
        note = visible(notes[run.name].note.partition("\n")[0])
        said = (" ".join(notes[run.name].tags), note if len(note) <= 40 else note[:39] + "…") if noted else ()
        success = _success(run)
        if run.state is None:
            table.add_row(run.name, "unreadable", "-", success, "-", *said)
            continue
        started = f"{duration(max(0.0, time.time() - run.state.started_s))} ago"
        table.add_row(run.name, str(run.state.status), str(run.state.step), success, started, *said)
    return table


def _success(run: RunSummary) -> str:
    """Of its summary, or, as long as it has none, of the evaluations so far. Example: "0.43 -> 0.97" """
    if "success_after" in run.summary:
        return f"{run.summary['success_before']:.2f} -> {run.summary['success_after']:.2f}"
    rows = read_json_lines(RunFolder(path=run.path).metrics)
    found = [row["eval/success"] for row in rows if row["kind"] == "evaluation" and row.get("eval/success") is not None]
    if not found:
        return "-"
    return f"{found[0]:.2f} -> {found[-1]:.2f}" if len(found) > 1 else f"{found[0]:.2f}"


def show_run(run: str, *, root: str = "runs", as_json: bool = False) -> int:
    """Status, what was asked for, the curve of evaluations, the last step."""
    folder = resolve_run(root, run)
    facts = _run_facts(folder)
    if as_json:
        print(json.dumps(facts))
        return 0
    console = plain_console()
    started = datetime.fromtimestamp(facts["started_s"]).strftime("%Y-%m-%d %H:%M")
    console.print(
        Text(f"{facts['run']}  {facts['status']}, step {facts['step']} of {facts['steps']}, started {started}")
    )
    if facts["error"]:
        console.print(Text(visible(facts["error"]), style="red"))
    console.print(Text(facts["verdict"], style="bold"), soft_wrap=True)
    changed = "  ".join(f"{key}={value}" for key, value in facts["changed"].items())
    console.print(Text(f"\nsettings that differ from the defaults: {changed or 'none'}"))
    _print_evaluations(console, facts["evaluations"])
    _print_last_step(console, facts["metrics"])
    console.print(Text(f"\n{facts['throughput']}"))
    for alert in facts["alerts"]:
        console.print(Text(visible(f"alert since step {alert['step']}: {alert['rule']}: {alert['text']}"), style="red"))
    if facts["trajectories"]:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(facts["trajectories"].items()))
        console.print(Text(f"\ntrajectories: {counts}; read one with shoal show {facts['run']} --traj 1"))
    return 0


def show_trajectory(run: str, key: str, *, root: str = "runs", as_json: bool = False) -> int:
    """One episode, word by word, by its row number or id."""
    folder = resolve_run(root, run)
    try:
        reader = TrajectoryReader(folder.trajectories)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    try:
        stored = reader.get(int(key) if key.isdecimal() else key)
    except KeyError as error:
        raise UsageError(f"{folder.name}: {error.args[0]}") from None
    finally:
        reader.close()
    if as_json:
        print(
            json.dumps(_trajectory_facts(stored) | {"lineage": [asdict(event) for event in _lineage(folder, stored)]})
        )
        return 0
    console = plain_console()
    _print_trajectory(console, stored)
    if events := _lineage(folder, stored):
        console.print(Text(visible(f"lineage of its group: {story(events)}"), style="dim"), soft_wrap=True)
    return 0


# --- what a run folder says -----------------------------------------------------------------------------------------


def _run_facts(folder: RunFolder) -> dict[str, Any]:
    try:
        state = folder.state()
    except RunFolderError as error:
        raise UsageError(str(error)) from None
    config = _config_of(folder)
    rows = list(read_json_lines(folder.metrics))
    verdict = judge(rows, settings_of_config(config))
    steps = [row for row in rows if row["kind"] == "step"]
    return {
        "run": folder.name,
        "status": str(state.status),
        "step": state.step,
        "steps": config.steps,
        "started_s": state.started_s,
        "error": state.error,
        "changed": _changed(config),
        "evaluations": [row for row in rows if row["kind"] == "evaluation"],
        "metrics": steps[-1] if steps else {},
        "verdict": verdict.learning.sentence,
        "learning": asdict(verdict.learning),
        "throughput": verdict.throughput.sentence,
        "alerts": list(active_alerts(read_json_lines(folder.events)).values()),
        "trajectories": _trajectory_counts(folder),
        "summary": json.loads(folder.summary.read_text()) if folder.summary.is_file() else {},
    }


def _config_of(folder: RunFolder) -> TrainConfig:
    from conf.loading import read_config

    try:
        return read_config(folder.config.read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder.config} is missing: the run ended before it began") from None


def _changed(config: TrainConfig) -> dict[str, Any]:
    defaults = TrainConfig()
    return {key: lookup(config, key) for key in leaf_keys(config) if lookup(config, key) != lookup(defaults, key)}


def _trajectory_counts(folder: RunFolder) -> dict[str, int]:
    if not folder.trajectories.is_file():
        return {}
    reader = TrajectoryReader(folder.trajectories)
    try:
        return reader.counts()
    finally:
        reader.close()


def _lineage(folder: RunFolder, stored: StoredTrajectory) -> list[LineageEvent]:
    """What the ledger tells of a trajectory's group; nothing of one that is held out, served, or of an old ledger."""
    if stored.split != "train":
        return []
    try:
        return read_lineage(folder.ledger, stored.trajectory.group_id)
    except sqlite3.Error:
        return []


def _trajectory_facts(stored: StoredTrajectory) -> dict[str, Any]:
    trajectory = stored.trajectory
    return {
        "row": stored.row,
        "id": trajectory.trajectory_id,
        "env": trajectory.task.env_name,
        "status": stored.status,
        "cause": stored.cause,
        "step": stored.step,
        "reward": trajectory.reward,
        "reward_parts": trajectory.reward_parts,
        "advantage": stored.advantage,
        "stop_reason": str(trajectory.stop_reason),
        "versions": [trajectory.min_policy_version, trajectory.max_policy_version],
        "num_turns": trajectory.num_turns,
        "num_sampled_tokens": trajectory.num_sampled_tokens,
        "messages": [message_text(message).strip() for message in _messages(trajectory)],
        "printed": _printed(trajectory),
        "error": asdict(trajectory.error) if trajectory.error else None,
    }


def _printed(trajectory: Trajectory) -> str:
    """What the environment printed (envs/pool/printed.py)."""
    return str(trajectory.meta.get("printed", ""))


def _messages(trajectory: Trajectory) -> list[Message]:
    turns = [message for turn in trajectory.turns for message in (turn.message, *turn.reply)]
    return [*trajectory.prompt, *turns]


# --- for people -----------------------------------------------------------------------------------------------------


def _print_evaluations(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.print("\nno evaluation yet")
        return
    console.print(Text(f"\nheld-out success  {sparkline([row['eval/success'] or 0.0 for row in rows])}"))
    for row in rows:
        low, high = row["eval/ci95_low"], row["eval/ci95_high"]
        success = f"{row['eval/success']:.3f}  (95% {low:.3f} to {high:.3f}, n={row['eval/n']})"
        console.print(Text(f"  step {row['step']:>5}  version {row['policy_version']:>5}  {success}"))


def _print_last_step(console: Console, metrics: dict[str, Any]) -> None:
    if not metrics:
        return
    console.print(Text(f"\nstep {metrics['step']}, {duration(metrics['time_s'])} into the run"))
    for key in LAST_METRICS:
        if metrics.get(key) is not None:
            console.print(Text(f"  {key:<26}{metrics[key]:.4g}"))


def _print_trajectory(console: Console, stored: StoredTrajectory) -> None:
    trajectory = stored.trajectory
    fate = stored.status + (f" ({stored.cause})" if stored.cause else "")
    fate += f" at step {stored.step}" if stored.step is not None else ""
    console.print(Text(visible(f"{trajectory.trajectory_id}  row {stored.row}  level {trajectory.task.level}  {fate}")))
    for message in trajectory.prompt:
        _print_message(console, message)
    for number, turn in enumerate(trajectory.turns, start=1):
        versions = sorted(set(trajectory.policy_versions[turn.start : turn.end].tolist()))
        span = " to ".join(str(version) for version in versions[:1] + versions[1:][-1:]) or "none"
        console.print(
            Text(
                f"- turn {number}: {turn.end - turn.start} tokens by policy version {span}, {turn.finish_reason}, "
                f"sampled in {turn.sample_s:.2f} s, environment {turn.env_s:.2f} s",
                style="dim",
            )
        )
        for message in (turn.message, *turn.reply):
            _print_message(console, message)
    parts = ", ".join(f"{name} {value:g}" for name, value in trajectory.reward_parts.items())
    reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}" + (f" ({parts})" if parts else "")
    advantage = "" if stored.advantage is None else f", advantage {stored.advantage:.3f}"
    console.print(Text(visible(f"ended: {trajectory.stop_reason}, reward {reward}{advantage}"), style="bold"))
    if printed := _printed(trajectory):
        console.print(Text(visible(f"printed:\n{printed.rstrip()}")))
    if trajectory.error is not None:
        error = trajectory.error
        console.print(Text(visible(f"{error.kind} error in {error.where}: {error.message}"), style="red"))
        console.print(Text(visible(error.traceback)))


def _print_message(console: Console, message: Message) -> None:
    console.print(Text(visible(message_text(message)), style=ROLE_STYLES[message.role]))
