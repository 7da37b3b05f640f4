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
    stat = path.stat()
    tag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    headers = {"cache-control": "no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)


def send_static(request: Request) -> Response:
    path = STATIC / request.path_params["name"]
    if path.parent != STATIC or path.suffix not in TYPES or not path.is_file():
        return JSONResponse({"error": "no such file"}, 404)
    return send_file(request, path)


class ChartLibrary:
    """The JavaScript that the installed plotly package carries, found without importing it.

    Whoever asks before the compressed copy is ready gets the file as it is: nobody waits for the compression.
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
        answer = send_file(request, self._path)
        answer.headers["vary"] = "accept-encoding"
        takes_gzip = "gzip" in request.headers.get("accept-encoding", "")
        if answer.status_code != 200 or not self._compressed or not takes_gzip:
            return answer
        headers = {name: answer.headers[name] for name in ("cache-control", "etag", "vary")}
        headers["content-encoding"] = "gzip"
        return Response(self._compressed, media_type=TYPES[".js"], headers=headers)

    def _compress(self) -> None:
        self._compressed = gzip.compress(self._path.read_bytes(), 6, mtime=0)
