"""The dashboard's server: a Starlette application over one folder of runs, read only.

Every answer is bounded: rows by paging, series by thinning, texts and files by bytes; what is for other programs, CSV
and traces, is whole and sent in pieces. An answer is made of the run's
files at the time of asking; nothing is kept but the columns of metrics.jsonl.
"""

import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rl.dashboard import database, heat_maps, overview, processes, sweeps
from rl.dashboard.folders import NotThere, Refused, config_group, confined, find_run, read_text
from rl.dashboard.metrics import AXES, MetricTables
from rl.dashboard.security import Access, Guard
from rl.dashboard.span_trace import trace_json
from rl.dashboard.static_files import STATIC, ChartLibrary, send_file, send_static
from rl.dashboard.stream import MAX_STREAMS, follow
from rl.monitor.verdict import verdict_settings
from rl.runs.notes import read_notes
from rl.runs.run_folder import LATEST, RunFolder, list_runs
from rollout.record.codec import plain

MAX_ANSWER_BYTES = 8 * 2**20
MAX_POINTS = 2000
MAX_SERIES = 256
MAX_RUNS = 500
MAX_FILE_BYTES = 2**20


class Stop:
    """Set when the server is to end, so that open streams end too."""

    def __init__(self) -> None:
        self.is_set = False


class Dashboard:
    """The answers. Example: Dashboard(Path("runs"), Stop()).runs({}) -> {"runs": [...]}"""

    def __init__(self, root: Path, stop: Stop) -> None:
        self.root = root
        self.stop = stop
        self.tables = MetricTables()
        self.num_streams = 0

    def read_newest(self) -> None:
        """The columns of the run that is looked at first, most often."""
        with contextlib.suppress(NotThere, OSError):
            self.tables.get(find_run(self.root, LATEST).metrics)

    def runs(self, _: Mapping[str, str]) -> dict[str, Any]:
        found = []
        for run in list_runs(self.root)[:MAX_RUNS]:
            state = run.state
            facts = {"status": state.status, "step": state.step, "started_s": state.started_s} if state else {}
            summary = {
                k: run.summary.get(k) for k in ("env", "seed", "success_before", "success_after", "train_seconds")
            }
            said = read_notes(run.path)
            notes = {"note": said.note, "tags": said.tags}
            told = {"run": run.name, "fault": run.fault, "error": state.error if state else ""}
            folder = RunFolder(path=run.path)
            place = sweeps.place_in_sweep(folder)
            of = {"group": config_group(folder), "sweep": place["id"] if place else ""}
            found.append({**told, **notes, **facts, **summary, **of})
        return {"runs": found}

    def sweep(self, query: Mapping[str, str]) -> dict[str, Any]:
        """`id`: which one."""
        name = query.get("id", "")
        placed = ((run, sweeps.place_in_sweep(RunFolder(path=run.path))) for run in list_runs(self.root))
        return sweeps.compare(name, [(run, place) for run, place in placed if place and place["id"] == name][:MAX_RUNS])

    def run(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        """State, result, newest step and evaluation; where its metrics.jsonl and events.jsonl were read to."""
        state = folder.state()
        table = self.tables.get(folder.metrics)
        return {
            "run": folder.name,
            "state": {
                name: getattr(state, name) for name in ("status", "step", "started_s", "heartbeat_s", "error", "host")
            },
            "summary": _mapping(read_text(folder, folder.summary, MAX_FILE_BYTES)),
            "last": table.last,
            "keys": table.keys(),
            "bad_lines": table.num_bad,
            "trajectories": self._database(folder, database.counts, {}),
            "cursor": str(table.cursor),
        }

    def glance(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        settings = verdict_settings(_settings(folder))
        return overview.glance(folder, self.tables.get(folder.metrics), settings)

    def histograms(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        step = _whole(query, "step", 0, 0, 2**62)
        return self._database(folder, lambda db: overview.histograms(db, step), {"step": 0, "n": 0})

    def heatmaps(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        return self._database(folder, heat_maps.heat_maps, {"steps": []})

    def series(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        keys = [key for key in query.get("keys", "").split(",") if key]
        if not 1 <= len(keys) <= MAX_SERIES:
            raise Refused(f"keys names 1 to {MAX_SERIES} series, separated by commas; got {len(keys)}")
        axes = AXES if "axis" not in query else (query["axis"],)
        if not set(axes) <= set(AXES):
            raise Refused(f"axis is one of {', '.join(AXES)}; got {query['axis'][:50]!r}")
        table = self.tables.get(folder.metrics)
        max_points = _whole(query, "max_points", MAX_POINTS, 2, MAX_POINTS)
        return {"run": folder.name, "series": table.series(keys, max_points, axes), "cursor": str(table.cursor)}

    def trajectories(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        filters = {k: v for k, v in query.items() if k not in ("before", "limit") and v != ""}
        before, limit = _whole(query, "before", 0, 0, 2**62), _whole(query, "limit", 50, 1, database.MAX_ROWS)
        return self._database(
            folder,
            lambda db: database.list_rows(db, filters, before=before, limit=limit),
            {"rows": [], "next": None, "cut": False},
        )

    def facets(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        return self._database(folder, database.facets, {})

    def trajectory(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        return self._database(folder, lambda db: database.read_row(db, _whole(query, "row", 0, 0, 2**62)))

    def tokens(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        row, offset = _whole(query, "row", 0, 0, 2**62), _whole(query, "offset", 0, 0, 2**40)
        limit = _whole(query, "limit", 500, 1, 2000)
        answer = self._database(folder, lambda db: database.read_tokens(db, row, offset=offset, limit=limit))
        config = _settings(folder)
        return answer | _limits_of_ratio(config) | {"text": _token_texts(answer["id"], config)}

    def workers(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        return processes.workers(folder)

    def ledger(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        from rollout.record.ledger import LedgerError, read_audit

        path = confined(folder, folder.ledger)
        before, state = _whole(query, "before", 0, 0, 2**62), query.get("state", "")
        with database.reading(path) as db:
            limit = _whole(query, "limit", 50, 1, 200)
            answer = database.ledger_rows(db, state=state, group=query.get("group", ""), before=before, limit=limit)
        try:
            return answer | {"audit": read_audit(path)}
        except LedgerError as error:
            raise Refused(str(error)) from error

    def lineage(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        before, limit = _whole(query, "before", 0, 0, 2**62), _whole(query, "limit", 100, 1, database.MAX_ROWS)
        with database.reading(confined(folder, folder.ledger)) as db:
            if "group" in query:
                return database.lineage_of_group(db, query["group"])
            return database.newest_lineage(db, before=before, limit=limit)

    def config(self, folder: RunFolder, _: Mapping[str, str]) -> dict[str, Any]:
        values = _settings(folder)
        return {"config": values, "manifest": _mapping(read_text(folder, folder.manifest, MAX_FILE_BYTES))}

    def logs(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        if "name" in query:
            return processes.read_log(folder, query["name"], _whole(query, "offset", -1, -1, 2**62))
        return {"logs": processes.list_logs(folder)}

    def events(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        limit = _whole(query, "limit", 500, 1, 5000)
        rows, cursor = processes.last_rows_and_cursor(folder, folder.events, limit)
        return {"events": rows, "cursor": f"{self.tables.get(folder.metrics).cursor}-{cursor}"}

    def spans(self, folder: RunFolder, query: Mapping[str, str]) -> dict[str, Any]:
        return {"spans": processes.last_rows(folder, folder.spans, _whole(query, "limit", 1500, 1, 5000))}

    def _database(self, folder: RunFolder, ask: Callable[[Any], Any], empty: Any = None) -> Any:
        """`empty` answers where the run has no file of trajectories yet."""
        if empty is not None and not folder.trajectories.is_file():
            return empty
        updates = None
        with contextlib.suppress(Refused):  # a damaged config.yaml hides no trajectory
            updates = _settings(folder).get("learner.updates_per_step")
        updates = updates if isinstance(updates, int) and 0 < updates < 2**31 else 1
        with database.reading(confined(folder, folder.trajectories), updates_per_step=updates) as db:
            return ask(db)


def make_app(root: Path, access: Access, stop: Stop | None = None) -> Guard:
    """The application, to be served by any ASGI server."""
    board, charts = Dashboard(root, stop or Stop()), ChartLibrary()
    of_run = (
        "glance",
        "histograms",
        "heatmaps",
        "series",
        "trajectories",
        "facets",
        "trajectory",
        "tokens",
        "workers",
        "ledger",
        "lineage",
        "config",
        "logs",
        "events",
    )
    routes = [
        Route("/", lambda request: send_file(request, STATIC / "index.html")),
        Route("/static/{name}", send_static),
        Route("/charts.js", charts.send),
        Route("/api/runs", _answer(board, board.runs)),
        Route("/api/sweep", _answer(board, board.sweep)),
        Route("/api/runs/{run}", _answer_of_run(board, board.run)),
        *(Route(f"/api/runs/{{run}}/{name}", _answer_of_run(board, getattr(board, name))) for name in of_run),
        Route("/api/runs/{run}/spans", _answer_of_run(board, board.spans)),
        Route("/api/runs/{run}/perfetto.json", functools.partial(_trace, board)),
        Route("/api/runs/{run}/csv", functools.partial(_csv, board)),
        Route("/api/runs/{run}/images/{sha256}", functools.partial(_image, board)),
        Route("/api/runs/{run}/stream", functools.partial(_stream, board)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        charts.compress()  # both before the first page asks: beside that page they would slow it
        threading.Thread(target=board.read_newest, name="read-newest", daemon=True).start()
        yield

    return Guard(Starlette(routes=routes, lifespan=lifespan), access)


# --- requests and answers -------------------------------------------------------------------------------------------


def _answer(board: Dashboard, ask: Callable[[Mapping[str, str]], Any]) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:  # not async: Starlette runs it in a thread, for it reads files
        return _json(lambda: ask(request.query_params))

    return endpoint


def _answer_of_run(
    board: Dashboard, ask: Callable[[RunFolder, Mapping[str, str]], Any]
) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        return _json(lambda: ask(find_run(board.root, request.path_params["run"]), request.query_params))

    return endpoint


def _json(ask: Callable[[], Any]) -> Response:
    try:
        body = json.dumps(plain(ask()), separators=(",", ":"), allow_nan=False)  # ASCII: texts may hold lone surrogates
    except Exception as error:  # files of a run are of foreign making; `_failure` raises what is our own fault
        return _failure(error)
    if len(body) > MAX_ANSWER_BYTES:
        return _error(413, f"the answer has {len(body)} bytes, more than {MAX_ANSWER_BYTES}: ask for less")
    return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _failure(error: Exception) -> Response:
    """What a run's files or a request do wrong is told; our own bugs are raised."""
    if isinstance(error, NotThere):
        return _error(404, str(error.args[0]))
    if isinstance(error, Refused):
        return _error(400, str(error))
    if isinstance(error, OSError | RuntimeError | ValueError | KeyError | TypeError):  # a file of foreign making
        return _error(422, f"cannot be read: {type(error).__name__}: {error}"[:1000])
    raise error


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": plain(text.encode("utf-8", "replace").decode())}, status)


def _csv(board: Dashboard, request: Request) -> Response:
    try:
        folder = find_run(board.root, request.path_params["run"])
    except NotThere as error:
        return _failure(error)
    keys = [key for key in request.query_params.get("keys", "").split(",") if key][:MAX_SERIES]
    lines = board.tables.get(folder.metrics).csv_lines(keys)
    name = {"content-disposition": f'attachment; filename="{folder.name}.csv"'}
    return StreamingResponse(lines, media_type="text/csv", headers=name)


def _trace(board: Dashboard, request: Request) -> Response:
    try:
        folder = find_run(board.root, request.path_params["run"])
    except NotThere as error:
        return _failure(error)
    headers = {"cache-control": "no-store"}
    return StreamingResponse(trace_json(folder), media_type="application/json", headers=headers)


def _image(board: Dashboard, request: Request) -> Response:
    try:
        folder = find_run(board.root, request.path_params["run"])
        with database.reading(confined(folder, folder.trajectories)) as db:
            data, kind = database.read_image(db, request.path_params["sha256"])
    except (NotThere, Refused) as error:
        return _failure(error)
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=31536000, immutable"})


async def _stream(board: Dashboard, request: Request) -> Response:
    try:
        folder = find_run(board.root, request.path_params["run"])
    except NotThere as error:
        return _failure(error)
    if board.num_streams >= MAX_STREAMS:
        return _error(503, f"{MAX_STREAMS} pages watch already")
    last_id = request.headers.get("last-event-id") or request.query_params.get("cursor", "")

    async def lines() -> AsyncIterator[str]:
        board.num_streams += 1
        try:
            async for line in follow(folder, last_id, lambda: board.stop.is_set):
                yield line
        finally:
            board.num_streams -= 1

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _whole(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise Refused(f"{name} is a whole number from {low} to {high}; got {text[:50]!r}")
    return value


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def _yaml(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"config.yaml is not YAML: {error}") from error
    return value if isinstance(value, dict) else {}


def _settings(folder: RunFolder) -> dict[str, Any]:
    """Of its config.yaml, by full names; empty where it has none."""
    return dict(_parsed(read_text(folder, folder.config, MAX_FILE_BYTES)))


@functools.lru_cache(maxsize=8)
def _parsed(config: str) -> dict[str, Any]:
    """YAML takes longer than most answers."""
    return _flat(_yaml(config))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _limits_of_ratio(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the loss takes a token's gradient away, by its ratio exp(learner - rollout); None where that does not tell.

    Only loss "clipped" around the rollout limits this ratio, and the stored logprobs are of the start of the step: of
    the weights that were updated only where a step has one update (rl/algorithm/loss.py).
    """
    limits = {name: config.get(f"learner.loss.{name}") for name in ("clip_low", "clip_high", "tis_cap")}
    loss = (config.get("learner.loss.name"), config.get("learner.loss.anchor"), config.get("learner.updates_per_step"))
    return limits if loss == ("clipped", "rollout", 1) else dict.fromkeys(limits)


def _token_texts(ids: list[int], config: Mapping[str, Any]) -> list[str] | None:
    """Text of each token where the run's tokenizer is our own; None where it would have to be loaded."""
    if config.get("policy.dialect") != "tiny":
        return None
    from policy.model.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    marks = {number: name for name, number in tokenizer.control_ids.items()}
    return [marks.get(token) or tokenizer.decode([token]) for token in ids]
