"""`shoal train -m seed=1,2,3`: every combination as a run of its own, one after the other, then a table."""

import json
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from conf.schema import TrainConfig
from rl.cli.child_process import INTERRUPTED, run_python
from rl.monitor.progress import plain_console
from rl.runs.run_folder import slug


def run_sweep(
    combinations: Sequence[Sequence[str]],
    configs: Sequence[TrainConfig],
    *,
    config_dirs: Sequence[str] = (),
    run: Callable[[Sequence[str]], int] = run_python,
) -> int:
    """Train each combination in a child process. Returns 0 if all did, 130 if interrupted, else 1.

    `configs[i]` is what `combinations[i]` says: all are known to be valid before the first starts.
    """
    sweep = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    settings = swept_settings(combinations)
    codes: list[int] = []
    summaries: list[dict[str, Any]] = []
    for number, (words, config) in enumerate(zip(combinations, configs, strict=True), start=1):
        name = f"{config.run.name or slug(config.env.name)}-{sweep}-{number}"
        folders = [word for folder in config_dirs for word in ("--config-dir", folder)]
        print(f"\n=== {number} of {len(combinations)}: {' '.join(words)}", flush=True)
        place = {"id": sweep, "number": number, "of": len(combinations), "settings": settings[number - 1]}
        codes.append(run(["-m", "rl.cli", "train", *words, *folders, "--sweep", json.dumps(place), f"run.name={name}"]))
        summaries.append(_summary(Path(config.run.root) / name))
        if codes[-1] == INTERRUPTED:
            break
    _print_table(combinations, codes, summaries)
    print(f"compare them: shoal dash, then #/sweep/{sweep} of its address")
    if INTERRUPTED in codes:
        return INTERRUPTED
    return 0 if not any(codes) else 1


def swept_settings(combinations: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Per combination, the settings in which they differ.

    Example: [["steps=9", "seed=1"], ["steps=9", "seed=2"]] -> [{"seed": "1"}, {"seed": "2"}]
    """
    values = [dict(word.split("=", 1) for word in words if "=" in word) for words in combinations]
    keys = dict.fromkeys(key for chosen in values for key in chosen)
    differing = [key for key in keys if len({chosen.get(key) for chosen in values}) > 1]
    return [{key: chosen[key] for key in differing if key in chosen} for chosen in values]


def _summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run, empty where it has none."""
    path = folder / "summary.json"
    return {"run": folder.name} | (json.loads(path.read_text()) if path.is_file() else {})


def _print_table(
    combinations: Sequence[Sequence[str]], codes: Sequence[int], summaries: Sequence[dict[str, Any]]
) -> None:
    constant = set.intersection(*(set(words) for words in combinations)) if len(combinations) > 1 else set()
    table = Table("changed", "run", "before", "after", "95% interval", "n", "seconds", "exit", box=None)
    for words, code, summary in zip(combinations, codes, summaries, strict=False):
        low, high = summary.get("ci95", (None, None))
        cells = [
            " ".join(word for word in words if word not in constant),
            summary["run"],
            _number(summary.get("success_before"), ".3f"),
            _number(summary.get("success_after"), ".3f"),
            f"{low:.3f} to {high:.3f}" if low is not None else "-",
            _number(summary.get("n"), "d"),
            _number(summary.get("train_seconds"), ".0f"),
            str(code),
        ]
        table.add_row(*cells)
    plain_console().print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
