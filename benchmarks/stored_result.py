"""The committed JSON of a benchmark: which commit it was made at, and whether what it measures has changed since."""

import json
import subprocess
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"

_LOOP = ("rl/algorithm", "rl/loop", "rollout", "policy/engine", "policy/model")
MEASURES: dict[str, tuple[str, ...]] = {
    "adapters": ("envs/adapters",),
    "async": _LOOP,
    "curriculum": ("envs/tasks", "rl/algorithm"),
    "dashboard": ("rl/dashboard",),
    "e2e": (*_LOOP, "benchmarks/peers"),
    "engine": ("policy/engine", "policy/model"),
    "env_check": ("envs/check", "envs/library"),
    "envs": ("envs/pool", "envs/base.py"),
    "learning": _LOOP,
    "sandbox": ("envs/sandbox",),
    "vllm_contract": ("policy/vllm", "policy/engine"),
    "vllm_demo": ("policy/vllm", *_LOOP),
    "vllm_engine": ("policy/vllm", "policy/engine"),
    "vllm_kills": ("policy/vllm", "rollout"),
}
"""Benchmark -> what its numbers are about: a change of these makes them old."""


def save_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `result` with the commit it was made at; `"changed"` is true where files of ours differed from it."""
    made_at = {"commit": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain", "-uno"))}
    stored = {**result, "made_at": made_at}
    path.write_text(json.dumps(stored, indent=2) + "\n")
    return stored


def why_stale(path: Path) -> str:
    """What makes a stored result older than the code; "" where nothing does.

    A result that was made in a changed tree is old as soon as it is stored: no commit has what it measured.
    """
    made_at = json.loads(path.read_text()).get("made_at")
    if not made_at:
        return "names no commit"
    if made_at["changed"]:
        return "made in a changed tree"
    name = next(name for name in sorted(MEASURES, key=len, reverse=True) if path.stem.startswith(name))
    watched = [f"benchmarks/{name}.py", *MEASURES[name]]
    changed = _git("diff", "--name-only", made_at["commit"], "--", *watched)
    if changed is None:
        return f"its commit {made_at['commit'][:8]} is not in this history"
    wings = sorted({line if line in watched else _watched(line, watched) for line in changed.splitlines()})
    return f"changed since: {', '.join(wings)}" if wings else ""


def _watched(file: str, watched: list[str]) -> str:
    return next(place for place in watched if file.startswith(place))


def _git(*words: str) -> str | None:
    """What git prints; None where it refuses or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
