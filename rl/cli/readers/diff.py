"""`shoal diff A B`: in which settings, versions and results two runs differ.

Settings are compared as they stand in each run's config.yaml, so runs of different versions of Shoal can be compared.
"""

import json
from collections.abc import Mapping
from math import sqrt
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.loading import resolved_yaml
from conf.schema import TrainConfig
from rl.cli.readers.show import LAST_METRICS
from rl.monitor.json_lines import read_json_lines
from rl.monitor.progress import plain_console, visible
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError, resolve_run

ABSENT = "(absent)"
RESULTS = ("steps", "success_before", "success_after", "n", "train_seconds", "restarts")
"""Of summary.json."""
OWN_KEYS = ("run.name",)
"""Settings that differ between any two runs and mean nothing."""

Differences = dict[str, list[Any]]
"""Name -> [value in A, value in B]; "(absent)" where one does not have it."""


def diff(run_a: str, run_b: str, *, root: str = "runs", as_json: bool = False) -> int:
    """0 whether or not they differ."""
    folders = resolve_run(root, run_a), resolve_run(root, run_b)
    facts = {
        "runs": [folder.name for folder in folders],
        "settings": _compared(settings_of, *folders),
        "versions": _compared(_versions, *folders),
        "results": _compared(_results, *folders),
        "success_difference": success_difference(*(read_json(folder.summary) for folder in folders)),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        _print(plain_console(), facts)
    return 0


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Differences:
    """Example: differences({"x": 1, "y": 2}, {"x": 1, "y": 3}) -> {"y": [2, 3]}"""
    names = [*a, *(name for name in b if name not in a)]
    return {n: [a.get(n, ABSENT), b.get(n, ABSENT)] for n in names if a.get(n, ABSENT) != b.get(n, ABSENT)}


def settings_of(folder: RunFolder) -> dict[str, Any]:
    """Every setting of a run by its dotted name. Raises `UsageError` where it left none."""
    try:
        return _flat(yaml.safe_load(folder.config.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        raise UsageError(f"{folder.config} is missing: the run ended before it began") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {folder.config}: {' '.join(str(error).split())}") from None


def default_settings() -> dict[str, Any]:
    """What a run has that changes nothing."""
    return _flat(yaml.safe_load(resolved_yaml(TrainConfig())))


def read_json(path: Any) -> dict[str, Any]:
    """A JSON object on disk; empty where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def success_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[float] | None:
    """[success of B minus that of A, low, high] at the end, 95 %; None where a run has no result.

    Newcombe's interval 10 (Statistics in Medicine 17, 1998) out of the two Wilson intervals: for samples that are
    independent. Runs of one evaluation.seed share their tasks, for which it is too wide rather than too narrow.
    """
    if not all({"success_after", "ci95"} <= summary.keys() for summary in (a, b)):
        return None
    p, (p_low, p_high) = a["success_after"], a["ci95"]
    q, (q_low, q_high) = b["success_after"], b["ci95"]
    below = sqrt((q - q_low) ** 2 + (p_high - p) ** 2)
    above = sqrt((q_high - q) ** 2 + (p - p_low) ** 2)
    return [q - p, q - p - below, q - p + above]


def _compared(read: Any, a: RunFolder, b: RunFolder) -> Differences:
    return {name: pair for name, pair in differences(read(a), read(b)).items() if name not in OWN_KEYS}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {key: value for name in tree for key, value in _flat(tree[name], f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def _versions(folder: RunFolder) -> dict[str, Any]:
    """Of packages, environments and code, and the machine."""
    manifest = read_json(folder.manifest)
    found = {name: manifest.get(name, ABSENT) for name in ("python", "platform", "cores")}
    found |= manifest.get("packages") or {}
    found |= {name: env.get("sha256", ABSENT)[:12] for name, env in (manifest.get("environments") or {}).items()}
    return found | {f"git {key}": value for key, value in (manifest.get("git") or {}).items()}


def _results(folder: RunFolder) -> dict[str, Any]:
    summary = read_json(folder.summary)
    steps = [row for row in read_json_lines(folder.metrics) if row["kind"] == "step"]
    last = steps[-1] if steps else {}
    found = {name: summary[name] for name in RESULTS if name in summary}
    return found | {f"last step: {name}": last[name] for name in LAST_METRICS if name in last}


def _print(console: Console, facts: Mapping[str, Any]) -> None:
    a, b = facts["runs"]
    for title in ("settings", "versions", "results"):
        if not facts[title]:
            console.print(f"{title}: no difference")
            continue
        table = Table(title, a, b, box=None, title_justify="left")
        for name, pair in facts[title].items():
            table.add_row(*(Text(visible(text)) for text in (name, *map(_shown, pair))))
        console.print(table)
    if facts["success_difference"]:
        value, low, high = facts["success_difference"]
        console.print(f"\nsuccess of {b} minus that of {a}: {value:+.3f} (95% {low:+.3f} to {high:+.3f})")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
