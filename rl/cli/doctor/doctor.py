"""`shoal doctor`: is this machine ready to train, and what helps where it is not."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rl.cli.doctor.doctor_checks import (
    Check,
    engine_check,
    machine_checks,
    port_check,
    ray_check,
    smoke_check,
    torch_check,
    version_checks,
    wandb_check,
    write_check,
)
from rl.monitor.progress import plain_console, visible

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
FAILED = 3
"""Exit code."""


def doctor(root: str = "runs", *, smoke: bool = True, as_json: bool = False) -> int:
    """0, or `FAILED` where a check failed; a warning is none."""
    console = plain_console()
    found = []
    started_s = time.monotonic()
    for check in all_checks(Path(root), smoke=smoke):
        found.append(check)
        if not as_json:
            _print(console, check)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found]}))
    else:
        counts = ", ".join(f"{sum(c.status == status for c in found)} {status}" for status in STYLES)
        console.print(f"\n{counts}, {time.monotonic() - started_s:.0f} s")
    return exit_code(found)


def all_checks(root: Path, *, smoke: bool) -> Iterator[Check]:
    """Quick ones first; nothing is trained on a machine where something else failed already."""
    found = []
    quick: Iterable[Check] = (
        *version_checks(),
        *machine_checks(root),
        write_check(root),
        port_check(),
        ray_check(),
        wandb_check(),
        engine_check(),
        torch_check(),
    )
    for check in quick:
        found.append(check)
        yield check
    if smoke and exit_code(found) == 0:
        yield smoke_check()


def exit_code(checks: Iterable[Check]) -> int:
    return FAILED if any(check.status == "fail" for check in checks) else 0


def _print(console: Console, check: Check) -> None:
    line = Text(f"{check.status:<5}", style=STYLES[check.status])
    line.append(visible(f"{check.name:<14} {check.found}"), style="default")
    console.print(line)
    if check.fix:
        console.print(Text(visible(f"     {'':<14} help: {check.fix}")))
