"""Rows of two stored runs, as far as the learning verdict looks at them: `make demo`, and the same with lr=0.3."""

import json
from pathlib import Path
from typing import Any


def stored_rows(run: str) -> list[dict[str, Any]]:
    """`run`: "demo" or "collapsed" (learner.optimizer.lr=0.3 warmup_steps=0, 12 steps)."""
    stored = json.loads((Path(__file__).parent / "learning_metrics.json").read_text())
    rows = [dict(zip(stored["columns"], values, strict=True)) for values in stored["runs"][run]]
    return [{key: value for key, value in row.items() if value != "absent"} for row in rows]
