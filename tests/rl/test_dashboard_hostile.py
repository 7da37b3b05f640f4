"""Every stored text is an attack, every view is opened in a real browser: the texts are there, and nothing else is."""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.rl.dashboard_runs import RUN, start_server
from tests.rl.hostile_run import ATTACKS, all_marked, file_name, make_hostile_run, marked

pytestmark = pytest.mark.browser

EPISODE = {
    *("trajectories.id", "groups.group_id", "trajectories.env_name", "trajectories.seed", "trajectories.status"),
    *("trajectories.cause", "trajectories.stop_reason", "trajectories.worker", "trajectories.reward_parts.key"),
    *(f"trajectories.error.{name}" for name in ("kind", "where", "message", "traceback")),
    *("trajectories.meta.value", "trajectories.prompt.role", "trajectories.prompt.content.text"),
    *("trajectories.turns.finish_reason", "trajectories.turns.message.role", "trajectories.turns.reply.role"),
    *("trajectories.turns.message.content.text", "trajectories.engine"),
    *(
        f"trajectories.turns.message.tool_calls.{name}"
        for name in ("name", "error", "arguments.key", "arguments.value")
    ),
    *(f"trajectories.turns.reply.tool_result.{name}" for name in ("call_id", "name", "content", "error")),
}
SHOWN = {
    "runs": {"run.error", "notes.note", "summary.env", "folder", "metric", "sweep.id"},
    "sweep": {"sweep.id", "sweep.key", "sweep.value"},
    "overview": {"run.error", "metric", "alert.rule", "alert.text", "alert.value", "alert.threshold",
                 "trajectories.status"},
    "trajectories": {"groups.group_id", "trajectories.env_name", "trajectories.status", "trajectories.cause",
                     "trajectories.stop_reason", "trajectories.worker"},
    "trajectory": EPISODE,
    "tokens": {"trajectories.status", "trajectories.cause"},
    "timeline": {"span.process", "span.activity"},
    "workers": {"span.process", "span.activity", "event.worker", "event.kind", "event.error", "trajectories.worker"},
    "ledger": {"groups.group_id", "groups.state", "groups.reason", "groups.worker", "groups.last_cause"},
    "lineage": {"groups.group_id", "groups.state", "groups.reason", "events.event", "events.worker", "events.cause",
                "trajectories.status", "trajectories.cause", "trajectories.stop_reason", "trajectories.worker"},
    "config": {"config.key", "config.value", "manifest.key", "manifest.value"},
    "logs": {"log.name", "log.text"},
    "events": {"event.kind", "event.worker", "event.error", "event.key", "event.more.deep", "alert.rule", "alert.level",
               "alert.text", "alert.value", "alert.threshold"},
}  # fmt: skip
"""View -> fields that it must show as text."""
NOT_SHOWN = {
    *("run.host", "groups.task", "groups.digest", "trajectories.env_id", "trajectories.split"),
    *("trajectories.problem_digest", "trajectories.routed_shape", "trajectories.meta.key"),
    *("trajectories.reward_parts.value", "trajectories.prompt.content.media_type", "trajectories.turns.parse_status"),
    *(f"trajectories.task.{name}" for name in ("env_id", "env_name", "task_id")),
    "trajectories.turns.message.tool_calls.call_id",
}
"""Stored and on no page."""
TEXTS = """() => {
  const of = (names) => [...document.querySelectorAll('*')].flatMap((n) => names.map((name) => n.getAttribute(name)));
  const charts = [...document.querySelectorAll('.chart')].flatMap((n) => (n.data || []).flatMap((t) => [t.name, t.y]));
  return [document.title, document.body.textContent, ...of(['title', 'value', 'href', 'data-alert']), ...charts.flat()]
    .filter((text) => typeof text === 'string').join('\\n');
}"""
FOREIGN_NODES = """() => [...document.querySelectorAll('body *')].filter((n) =>
    ['script', 'iframe', 'object', 'embed', 'link', 'base', 'form', 'meta'].includes(n.localName) ||
    [...n.attributes].some(({ name, value }) => name.startsWith('on') || name === 'srcdoc' ||
      ['href', 'src', 'xlink:href', 'action', 'data'].includes(name) && !/^(#|[/]api[/])/.test(value)))
  .map((n) => n.outerHTML.slice(0, 200))"""
HOVER = """() => document.querySelectorAll('.chart').forEach((node) => (node.data || []).forEach((_, i) => {
  try { window.Plotly.Fx.hover(node, [{ curveNumber: i, pointNumber: 0 }]); } catch { /* not drawn in view */ }
}))"""
SETTLED = """() => document.getElementById('view').dataset.ready === (location.hash || '#/') ||
  document.querySelector('#view > p.bad:only-child') !== null"""


def _deep_links() -> list[tuple[str, str]]:
    """(view, address after "#/"), attacks in the address included."""
    found = [
        ("runs", ""),
        *((view, f"run/{RUN}/{view}") for view in SHOWN if view not in ("runs", "sweep", "trajectory", "tokens")),
        ("sweep", f"sweep/{quote(all_marked('sweep.id'), safe='')}?key=reward/mean"),
    ]
    for k, attack in enumerate(ATTACKS):
        group, metric = (
            quote(marked("groups.group_id", attack), safe=""),
            quote(f"reward/{marked('metric', attack)}", safe=""),
        )
        found += [
            ("trajectory", f"run/{RUN}/trajectory/{2 * k + 1}?side=1"),
            ("tokens", f"run/{RUN}/tokens/{2 * k + 1}"),
        ]
        found += [("runs", f"?key={metric}&runs={RUN}"), ("ledger", f"run/{RUN}/ledger?group={group}")]
        found += [("lineage", f"run/{RUN}/lineage/{group}?row={2 * k + 1}")]
        found += [("trajectories", f"run/{RUN}/trajectories?group={group}&text={quote(attack, safe='')}")]
        found += [("logs", f"run/{RUN}/logs?name={quote(file_name('log.name', attack), safe='')}.log")]
        found += [("none", f"run/{quote(file_name('folder', attack), safe='')}/overview")]
        found += [("none", f"run/{RUN}/{quote(attack, safe='')}")]
    return found


@pytest.mark.slow
def test_attacks_in_every_stored_text_are_shown_as_text_by_every_view(page: Any, tmp_path: Path) -> None:
    _, fields = make_hostile_run(tmp_path)
    assert set().union(*SHOWN.values()) | NOT_SHOWN == fields, "say in SHOWN or NOT_SHOWN where a new field is"
    problems: list[str] = []
    server, address = start_server(tmp_path)
    page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(f"page error {error}"))
    page.on("console", lambda message: _judge_line(message, problems))
    page.on("request", lambda request: _judge_request(request.url, address, problems))
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.blockedURI))"
    )
    shown: dict[str, str] = {}
    try:
        page.goto(address)
        for view, link in _deep_links():
            page.evaluate("(hash) => { location.hash = hash; }", f"#/{link}")
            _settle(page, link)
            if view in ("runs", "sweep", "overview", "timeline"):
                page.evaluate(HOVER)
            assert page.evaluate(FOREIGN_NODES) == [], link
            assert not page.evaluate("'attacked' in window"), link
            shown[view] = shown.get(view, "") + page.evaluate(TEXTS)
        time.sleep(0.3)  # an image that cannot be had, a script that waits
        assert problems == []
    finally:
        server.kill()
        server.wait(10)
    for view, wanted in SHOWN.items():
        missing = [marked(f, a) for f in sorted(wanted) for a in ATTACKS if not _is_there(marked(f, a), shown[view])]
        assert missing == [], view


def _judge_line(message: Any, problems: list[str]) -> None:
    """What the browser says of a question answered with 404 is no problem: some addresses name what is not there."""
    if message.type == "error" and "status of 404" not in message.text:
        problems.append(f"console {message.text}")


def _judge_request(url: str, address: str, problems: list[str]) -> None:
    """To our server, and to nothing that a text names: `<img src=x>` would ask for /x."""
    path = urlsplit(url).path
    ours = url.startswith(address) and (path in ("/", "/charts.js") or path.startswith(("/api/", "/static/")))
    if not ours and not url.startswith(("data:image/", "blob:")):
        problems.append(f"request {url}")


def _settle(page: Any, link: str) -> None:
    until = time.monotonic() + 10.0
    while not page.evaluate(SETTLED):
        assert time.monotonic() < until, f"{link}: {page.inner_text('#view')[:300]}"
        time.sleep(0.02)


def _is_there(text: str, page_text: str) -> bool:
    """As it is, as a file's name, inside JSON, or as the name of a line in a chart (rl/dashboard/static/charts.js)."""
    in_json = json.dumps(text, ensure_ascii=False)[1:-1]
    in_chart = text.replace("<", "‹").replace("&", "＆")
    return any(form in page_text for form in (text, text.replace("/", "|"), in_json, in_chart))
