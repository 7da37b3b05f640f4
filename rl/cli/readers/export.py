"""`shoal export RUN`: what a run holds, in forms that other programs read, into one folder.

    trajectories.jsonl   an object per episode: chat messages, reward, what became of it; tokens where asked for
    metrics.csv          a line per learner step and evaluation, a column per metric
    weights/             a checkpoint as a transformers folder: config.json, model.safetensors, the tokenizer
    tensorboard/         the metrics once more, where asked for

The run may be live, or of another machine. Texts are as models and environments wrote them: hostile.
"""

import base64
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.keys import nearest
from envs.message import ContentPart, Message, TextPart
from rl.dashboard.metrics import MetricTable
from rl.runs.checkpoint import Checkpoint, CheckpointError, list_checkpoints, load_latest, read_checkpoint
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError, resolve_run
from rollout.record.codec import plain
from rollout.record.recorder import StoredTrajectory, TrajectoryReader

PARTS = ("trajectories", "metrics", "weights", "tensorboard")
USUAL = ("trajectories", "metrics", "weights")
"""Written where none is named; of these, those that the run has."""


def export(
    run: str,
    parts: Sequence[str] = (),
    *,
    root: str = "runs",
    output: str | None = None,
    filters: Mapping[str, Any] | None = None,
    tokens: bool = False,
    checkpoint: int | None = None,
    as_json: bool = False,
) -> int:
    """Write the parts into a folder that is new or holds none of them.

    `filters`: columns of trajectories.db and their values. `checkpoint`: of that step; None = the newest whole one.
    Raises `UsageError` for what is not there, and before anything is written where a part would be overwritten.
    """
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"cannot export {part!r}.{nearest(part, PARTS, 0.5)} Parts: {', '.join(PARTS)}")
    folder = resolve_run(root, run)
    out = Path(output or f"{folder.name}-export")
    chosen = parts or [part for part in USUAL if _has(folder, part)]
    if not chosen:
        raise UsageError(f"{folder.name} holds nothing to export yet")
    for part in chosen:
        if (out / _FILES[part]).exists():
            raise UsageError(f"{out / _FILES[part]} is there already: name another folder with -o")
    writers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "trajectories": lambda path: _write_trajectories(folder, path, filters or {}, tokens=tokens),
        "metrics": lambda path: _write_metrics(folder, path),
        "weights": lambda path: _write_weights(folder, path, checkpoint),
        "tensorboard": lambda path: _write_tensorboard(folder, path),
    }
    out.mkdir(parents=True, exist_ok=True)
    told = {_FILES[part]: _written(writers[part], out / _FILES[part]) for part in dict.fromkeys(chosen)}
    if as_json:
        print(json.dumps({"path": str(out), "files": told}))
        return 0
    for name, facts in told.items():
        print(f"wrote {out / name}: " + ", ".join(f"{value} {key}" for key, value in facts.items()))
    return 0


_FILES = {
    "trajectories": "trajectories.jsonl",
    "metrics": "metrics.csv",
    "weights": "weights",
    "tensorboard": "tensorboard",
}


def _has(folder: RunFolder, part: str) -> bool:
    if part == "trajectories":
        return folder.trajectories.is_file()
    return folder.metrics.is_file() if part == "metrics" else bool(list_checkpoints(folder.checkpoints))


def _written(write: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Under another name until it is whole; {"bytes": ..., and what `write` tells}."""
    partial = path.with_name(f".{path.name}.part")
    _remove(partial)  # of an export that was killed
    try:
        facts = write(partial)
        partial.rename(path)
    except BaseException:  # interrupted too
        _remove(partial)
        raise
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return facts | {"bytes": sum(file.stat().st_size for file in files)}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# --- trajectories -----------------------------------------------------------------------------------------------------


def _write_trajectories(folder: RunFolder, path: Path, filters: Mapping[str, Any], *, tokens: bool) -> dict[str, Any]:
    try:
        reader = TrajectoryReader(folder.trajectories)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    count = 0
    with reader, path.open("w", encoding="utf-8") as file:
        for stored in reader.each(filters):
            row = trajectory_object(stored, tokens=tokens)
            file.write(json.dumps(plain(row), allow_nan=False) + "\n")  # ASCII: texts may hold lone surrogates
            count += 1
    return {"rows": count}


def trajectory_object(stored: StoredTrajectory, *, tokens: bool = False) -> dict[str, Any]:
    """One line of trajectories.jsonl; `tokens` adds the arrays, None where the learner computed nothing."""
    t = stored.trajectory
    turns = [message for turn in t.turns for message in (turn.message, *turn.reply)]
    found = {
        "row": stored.row,
        "id": t.trajectory_id,
        "group": t.group_id,
        "env": t.task.env_name,
        "env_id": t.task.env_id,
        "level": t.task.level,
        "seed": t.task.seed,
        "split": stored.split,
        "eval_step": stored.eval_step,
        "status": stored.status,
        "cause": stored.cause,
        "step": stored.step,
        "reward": t.reward,
        "reward_parts": t.reward_parts,
        "advantage": stored.advantage,
        "stop_reason": str(t.stop_reason),
        "versions": [t.min_policy_version, t.max_policy_version],
        "messages": [chat_message(message) for message in (*t.prompt, *turns)],
        "meta": t.meta,
        "error": t.error.message if t.error else None,
    }
    if not tokens:
        return found
    learner = stored.learner_logprobs
    return found | {
        "token_ids": t.token_ids.tolist(),
        "loss_mask": t.loss_mask.tolist(),
        "rollout_logprobs": t.rollout_logprobs.tolist(),
        "policy_versions": t.policy_versions.tolist(),
        "learner_logprobs": None if learner is None else learner.tolist(),
    }


def chat_message(message: Message) -> dict[str, Any]:
    """As chat templates and fine-tuning tools read it; content is a list of parts where there is an image.

    Example: {"role": "tool", "content": "5", "name": "add", "tool_call_id": "0"}
    """
    only_text = all(isinstance(part, TextPart) for part in message.content)
    parts = [_chat_part(part) for part in message.content]
    shown: dict[str, Any] = {
        "role": message.role,
        "content": "".join(part["text"] for part in parts) if only_text else parts,
    }
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({"error": call.error} if call.error else {})
            for call in message.tool_calls
        ]
    if message.tool_result is not None:
        result = message.tool_result
        shown |= {"name": result.name, "tool_call_id": result.call_id, "content": shown["content"] or result.content}
        shown |= {"error": result.error} if result.error else {}
    return shown


def _chat_part(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# --- metrics ----------------------------------------------------------------------------------------------------------


def _write_metrics(folder: RunFolder, path: Path) -> dict[str, Any]:
    if not folder.metrics.is_file():
        raise UsageError(f"{folder.name} has no metrics yet")
    table = MetricTable(folder.metrics)
    table.refresh()
    keys = [row["key"] for row in table.keys()]  # noqa: SIM118 (a method that tells more than names)
    count = -1  # the first line names the columns
    with path.open("w", encoding="utf-8", newline="") as file:
        for line in table.csv_lines(keys):
            file.write(line)
            count += 1
    return {"rows": count, "metrics": len(keys)}


def _write_tensorboard(folder: RunFolder, path: Path) -> dict[str, Any]:
    from rl.monitor.tensorboard_export import export_tensorboard

    try:
        return {"rows": export_tensorboard(folder.metrics, path)}
    except ImportError as error:
        raise UsageError(str(error)) from None


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(folder: RunFolder, path: Path, step: int | None) -> dict[str, Any]:
    """The model of the run's settings with the checkpoint's weights, as `save_pretrained` would leave it."""
    from conf.loading import read_config
    from policy.model.checkpoint_io import load_numpy_tensors, save_model
    from policy.model.hf_model import HfModel, load_policy_model
    from policy.model.hybrid import HybridModel
    from policy.sync.snapshot import WeightSyncError

    checkpoint = _checkpoint(folder, step)
    try:
        policy = read_config(folder.config.read_text()).policy
        model = load_policy_model(policy, seed=0)
        load_numpy_tensors(model, checkpoint.tensors["weights"])
    except (OSError, ValueError, WeightSyncError) as error:
        raise UsageError(f"cannot rebuild the model of {folder.name}: {error}") from error
    if isinstance(model, HybridModel):
        save_model(model, path)
    else:
        assert isinstance(model, HfModel)
        model.inner.save_pretrained(path)
    if policy.kind == "hf":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(policy.path, local_files_only=True).save_pretrained(path)
    return {"step": checkpoint.step, "tensors": len(checkpoint.tensors["weights"])}


def _checkpoint(folder: RunFolder, step: int | None) -> Checkpoint:
    try:
        if step is None:
            return load_latest(folder.checkpoints)
        return read_checkpoint(folder.checkpoints / f"step-{step:06d}")
    except CheckpointError as error:
        there = ", ".join(str(int(path.name.removeprefix("step-"))) for path in list_checkpoints(folder.checkpoints))
        raise UsageError(f"{error}; {folder.name} has checkpoints of steps: {there or 'none'}") from error
