"""`shoal top`: a run in the terminal, redrawn every second from its folder. Needs textual (extra `top`).

Metric names and events may hold what an environment wrote: all of it is shown as plain text, without markup.
"""

import json
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rl.cli.readers.run_watch import WATCHED, RunWatch, headline, spark
from rl.monitor.progress import visible
from rl.runs.usage import UsageError

if TYPE_CHECKING:
    from textual.app import App

REFRESH_S = 1.0
SPARK_WIDTH = 40


def run_app(watch: RunWatch) -> int:
    """Until `q` or Ctrl-C. Raises `UsageError` without textual."""
    make_app(watch).run()
    return 0


def make_app(watch: RunWatch, *, refresh_s: float = REFRESH_S) -> "App[None]":
    """The app, not yet running. Its class is made here: textual is optional and takes half a second to import."""
    try:
        from textual.app import App, ComposeResult
        from textual.binding import Binding
        from textual.widgets import DataTable, Footer, Static
    except ImportError:
        raise UsageError("shoal top needs textual: pip install 'shoal[top]'; shoal top --json needs nothing") from None

    class Top(App[None]):
        """Headline, verdict, metrics with their last steps, newest events first."""

        CSS = "#head { text-style: bold } #error { color: $error } #metrics { height: auto } #events { height: 1fr }"
        BINDINGS = [Binding("q", "quit", "leave (the run goes on)")]  # noqa: RUF012 (textual's own way)
        ENABLE_COMMAND_PALETTE = False

        def compose(self) -> ComposeResult:
            for name in ("head", "verdict", "error"):
                yield Static(id=name, markup=False)
            yield DataTable(id="metrics", cursor_type="none")
            yield Static(id="events", markup=False)
            yield Footer()

        def on_mount(self) -> None:
            self.query_one(DataTable).add_columns("metric", "now", f"last {SPARK_WIDTH} steps")
            self.show()
            self.set_interval(refresh_s, self.show)

        def show(self) -> None:
            try:
                glance = watch.look()
            except (UsageError, OSError, ValueError) as error:  # the folder went away or is damaged: say so, stay
                self.query_one("#error", Static).update(visible(str(error)))
                return
            self.query_one("#head", Static).update(visible(headline(glance)))
            self.query_one("#verdict", Static).update(visible("\n".join(glance.verdict.lines)))
            self.query_one("#error", Static).update(visible(glance.error))
            table = self.query_one(DataTable)
            table.clear()
            for metric in WATCHED:
                if (value := glance.metrics.get(metric)) is not None:
                    table.add_row(metric, f"{value:.4g}", Text(spark(watch.series(metric, SPARK_WIDTH))))
            lines = [event_line(event) for event in reversed(watch.events)]
            self.query_one("#events", Static).update("\n".join(["", *lines]))

    return Top()


def event_line(event: dict[str, Any]) -> str:
    """Example: "  31.2 s  checkpoint  step=20" """
    rest = {key: value for key, value in event.items() if key not in ("kind", "time_s", "unix_s")}
    told = "  ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())
    return visible(f"{event.get('time_s', 0.0):>8.1f} s  {event.get('kind', '')}  {told}".replace("\n", " "))
