"""The page's own files and the chart library: sent once, then answered with 304 for as long as they are the same."""

import gzip
import importlib.util
import threading
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


def send_file(request: Request, path: Path) -> Response:
    """A file of the page. A browser that has it asks whether it changed, so a newer Shoal is seen at once."""
    headers = {"cache-control": "no-cache", "etag": _tag(path)}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)


def send_static(request: Request) -> Response:
    path = STATIC / request.path_params["name"]
    if path.parent != STATIC or path.suffix not in TYPES or not path.is_file():
        return JSONResponse({"error": "no such file"}, 404)
    return send_file(request, path)


class ChartLibrary:
    """The JavaScript that the installed plotly package carries, found without importing it.

    Whoever asks before the compressed copy is ready gets it as it is: nobody waits for the compression.
    """

    def __init__(self) -> None:
        """Raises ModuleNotFoundError where plotly is missing."""
        spec = importlib.util.find_spec("plotly")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        self._path = Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
        self._compressed = b""
        self._started = threading.Lock()

    def compress(self) -> None:
        """Begin to, in a thread of its own; a second call does nothing."""
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._compress, name="compress-charts", daemon=True).start()

    def send(self, request: Request) -> Response:
        headers = {"cache-control": "no-cache", "etag": _tag(self._path, "compiled-at-once"), "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        body = self._compressed if "gzip" in request.headers.get("accept-encoding", "") else b""
        if body:
            headers["content-encoding"] = "gzip"
        return Response(body or self._read(), media_type=TYPES[".js"], headers=headers)

    def _compress(self) -> None:
        self._compressed = gzip.compress(self._read(), 6, mtime=0)

    def _read(self) -> bytes:
        return compiled_at_once(self._path.read_bytes())


def compiled_at_once(source: bytes) -> bytes:
    """The same program with its one large function in parentheses: `(.., () => {...})` becomes `(.., (() => {...}))`.

    A browser compiles a script beside the page while it arrives, but a function that is handed on as an argument is
    only skimmed: all of it is parsed once more, holding up the page, when it is called. Parentheses say it will be.
    A source of another form is left as it is.
    """
    opening, closing = b": this, () => {", b"}));"
    at, body = source.find(opening, 0, 2000), source.rstrip()
    if at < 0 or not body.endswith(closing):
        return source
    start, end = at + len(b": this, "), len(body) - len(b"));")
    return b"%b(%b)%b\n" % (body[:start], body[start:end], body[end:])


def _tag(path: Path, form: str = "") -> str:
    """Another one when the file changes, or what is made of it."""
    stat = path.stat()
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}{form}"'
