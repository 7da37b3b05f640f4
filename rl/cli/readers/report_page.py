"""`shoal report RUN`: one HTML file to send to somebody. It needs no server, loads nothing and runs no script.

Whatever a model, an environment or a machine wrote is hostile text: every string passes `_text`, and the page's own
policy forbids scripts and loading, should one ever slip through.
"""

import base64
import html
import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rl.cli.readers.diff import ABSENT, default_settings, differences, read_json, settings_of
from rl.cli.readers.plot import draw, with_values
from rl.cli.readers.show import LAST_METRICS
from rl.monitor.json_lines import read_json_lines
from rl.monitor.progress import duration, visible
from rl.monitor.verdict import judge
from rl.runs.run_folder import RunFolder, RunFolderError
from rl.runs.usage import UsageError, resolve_run

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere } .muted { color: #667 } .bad { color: #a00 }
pre { background: #f4f5f7; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } img { max-width: 49%; height: auto }
@media (max-width: 44rem) { .pair { grid-template-columns: 1fr } img { max-width: 100% } }
"""
MAX_ALERTS = 100
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report(run: str, *, root: str = "runs", output: str | None = None, as_json: bool = False) -> int:
    """Write the page; it may be asked for while the run goes on."""
    folder = resolve_run(root, run)
    path = Path(output or f"{folder.name}.html")
    path.write_text(page(folder), encoding="utf-8")
    told = {"path": str(path), "bytes": path.stat().st_size}
    print(json.dumps(told) if as_json else f"wrote {path}, {told['bytes'] / 1000:.0f} kB: open it in any browser")
    return 0


def page(folder: RunFolder) -> str:
    """The whole document. Raises `UsageError` where the run left no run.json or config that can be read."""
    rows = list(read_json_lines(folder.metrics))
    summary, manifest = read_json(folder.summary), read_json(folder.manifest)
    name = _text(folder.name)
    body = [
        f"<h1>{name}</h1>",
        _head(folder, summary),
        _verdict(folder, rows),
        _section("Alerts", _alerts(folder)),
        _pictures(rows),
        _section("Held-out evaluations", _evaluations(rows)),
        _section("One held-out task, before and after training", _transcripts(summary.get("transcripts"))),
        _section("Last step", _last_step(rows)),
        _section("Settings that differ from the defaults", _settings(folder)),
        _section("Made with", _made_with(manifest)),
        _section("Events", _events(folder)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _text(value: Any) -> str:
    """Anything as text of a page: no markup, and no character that would change the direction or hide another."""
    return html.escape(visible(str(value)), quote=True)


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    if not rows:
        return ""
    lines = ["<tr>" + "".join(f"<td>{_text(_rounded(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    top = "<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>" if head else ""
    return f"<table>{top}{''.join(lines)}</table>"


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _head(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    try:
        state = folder.state()
    except RunFolderError as error:
        raise UsageError(str(error)) from None
    started = datetime.fromtimestamp(state.started_s).strftime("%Y-%m-%d %H:%M")
    written = time.strftime("%Y-%m-%d %H:%M")
    lines = [f'<p class="muted">{_text(state.status)}, step {state.step}, started {started}; written {written}</p>']
    if {"success_before", "success_after", "ci95", "n", "train_seconds"} <= summary.keys():
        low, high = summary["ci95"]
        result = (
            f"{summary.get('env', '')}: success {summary['success_before']:.3f} to {summary['success_after']:.3f} "
            f"(95% interval {low:.3f} to {high:.3f}, {summary['n']} held-out tasks) "
            f"in {duration(summary['train_seconds'])}, {summary.get('steps')} steps"
        )
        lines.append(f"<p><strong>{_text(result)}</strong></p>")
    if state.error:
        lines.append(f'<p class="bad">{_text(state.error)}</p>')
    return "\n".join(lines)


def _verdict(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    bound = settings_of(folder).get("rollout.max_staleness")
    verdict = judge(rows, max_staleness=bound if isinstance(bound, int) else 0)
    return f"<p>{_text(verdict.sentence)}</p>" if verdict.limit != "unknown" else ""


def _alerts(folder: RunFolder) -> str:
    events = [row for row in read_json_lines(folder.events) if row.get("kind") == "alert"]
    keys = ("time_s", "step", "rule", "state", "value", "threshold", "text")
    found = [[row.get(key) for key in keys] for row in events[-MAX_ALERTS:]]
    return _table(found, ("seconds", "step", "rule", "", "value", "limit", "what")) or "<p>none</p>"


def _pictures(rows: Sequence[Mapping[str, Any]]) -> str:
    panels = with_values(rows)
    pictures = [
        f'<img alt="{_text(panel.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(draw(rows, [panel])).decode("ascii")}">'
        for panel in panels
    ]
    return "\n".join(pictures) or '<p class="muted">no step yet</p>'


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = ("step", "policy_version", "eval/success", "eval/ci95_low", "eval/ci95_high", "eval/n", "eval/errors")
    found = [[row.get(key) for key in keys] for row in rows if row["kind"] == "evaluation"]
    return _table(found, ("step", "version", "success", "95% from", "to", "n", "failed"))


def _transcripts(texts: Any) -> str:
    if not isinstance(texts, list) or len(texts) != 2:
        return ""
    return '<div class="pair">' + "".join(f"<pre>{_text(text)}</pre>" for text in texts) + "</div>"


def _last_step(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = [row for row in rows if row["kind"] == "step"]
    return _table([(key, steps[-1][key]) for key in LAST_METRICS if key in steps[-1]]) if steps else ""


def _settings(folder: RunFolder) -> str:
    changed = differences(default_settings(), settings_of(folder))
    shown = [(key, value, default) for key, (default, value) in changed.items() if value != ABSENT]
    return _table(shown, ("setting", "this run", "default")) or "<p>none</p>"


def _made_with(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return ""
    found = [("command", shlex.join(["shoal", *map(str, manifest.get("argv", ["", ""])[1:])]))]
    found += [(key, manifest[key]) for key in ("python", "platform", "cores", "seed") if key in manifest]
    found += list((manifest.get("packages") or {}).items())
    found += [(f"git {key}", value) for key, value in (manifest.get("git") or {}).items()]
    environments = manifest.get("environments") or {}
    found += [(name, f"sha256 {env.get('sha256', '')}") for name, env in environments.items()]
    return _table(found)


def _events(folder: RunFolder) -> str:
    counts = Counter(str(row.get("kind")) for row in read_json_lines(folder.events))
    return _table(counts.most_common())
