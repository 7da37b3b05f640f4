"""`shoal audit RUN`: where every group of a run stands, recounted from its ledger."""

import json
from typing import Any

from rl.monitor.progress import plain_console
from rl.runs.usage import UsageError, resolve_run
from rollout.record.ledger import LedgerError, read_audit

STATES = ("queued", "leased", "committed", "consumed")


def audit(run: str, *, root: str = "runs", as_json: bool = False) -> int:
    """1 where the ledger does not balance. Raises `UsageError` where the run has none."""
    folder = resolve_run(root, run)
    if not folder.ledger.is_file():
        raise UsageError(f"{folder.name} has no ledger: it ended before its first group")
    try:
        report = read_audit(folder.ledger)
    except LedgerError as error:
        raise UsageError(str(error)) from None
    if as_json:
        print(json.dumps(report))
    else:
        plain_console().print(audit_text(report))
    return 0 if report["balanced"] else 1


def audit_text(report: dict[str, Any]) -> str:
    """The balance as a sum, then what was dropped and why."""
    dropped = sum(report["dropped"].values())
    terms = " + ".join(f"{report[state]} {state}" for state in STATES)
    sign = "=" if report["balanced"] else "is not"
    lines = [f"{report['issued']} groups issued {sign} {terms} + {dropped} dropped"]
    lines += [f"  dropped, {reason}: {count}" for reason, count in sorted(report["dropped"].items())]
    lines.append(f"leased again: {report['redispatched']}, late results refused: {report['refused_commits']}")
    if not report["balanced"]:
        lines.append("a group was lost or counted twice: this is a bug of Shoal; keep the folder")
    return "\n".join(lines)
