"""The office API of ApiDesk-v0: its records and operations, and the same operations over real HTTP on loopback.

Routes: POST /login {"pin"}; GET /TABLE?page=N; GET /TABLE/ROW; POST /TABLE/ROW/ACTION {"value"}; answers are text.
"""

import asyncio
import copy
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

PAGE_ROWS = 5
_HOST = "127.0.0.1"
_TIMEOUT_S = 10.0

Rows = dict[int, dict[str, str]]
ACTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("tickets", "finish"): ("state", "finished"),
    ("tickets", "reopen"): ("state", "open"),
    ("tickets", "assign"): ("owner", ""),
    ("events", "move"): ("day", ""),
    ("events", "cancel"): ("state", "off"),
    ("mails", "archive"): ("box", "archive"),
    ("mails", "delete"): ("box", "trash"),
}
"""(table, action) -> field that it sets, and to what; "" = to the request's value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """Example: Reply(status=404, text="no such row")."""

    status: int
    text: str


@dataclass(kw_only=True, slots=True)
class Office:
    """One office. Requests change `tables`; everything that looks like chance was drawn before."""

    tables: dict[str, Rows]
    """Table -> number -> field -> text; every row has a "title"."""
    people: list[str]
    pin: str
    tokens: list[str]
    """Given out by one login after the other, then again from the first."""
    token_requests: int
    """Requests before a token expires; 0 = never."""
    faults: list[int]
    """Status that the n-th request fails with; 0 = none."""
    num_requests: int = 0
    num_logins: int = 0
    token: str = ""
    requests_left: int = 0

    def changes(self, before: dict[str, Rows]) -> dict[tuple[int, str], str]:
        """(row, field) -> new text of all that differs from `before`."""
        return {
            (row, field): text
            for table, rows in self.tables.items()
            for row, fields in rows.items()
            for field, text in fields.items()
            if text != before[table][row][field]
        }

    def snapshot(self) -> dict[str, Rows]:
        return copy.deepcopy(self.tables)

    def handle(self, method: str, path: str, token: str, body: dict[str, str]) -> Reply:
        """Answer one request. A request that fails changes nothing."""
        fault = self.faults[self.num_requests % len(self.faults)]
        self.num_requests += 1
        if fault:
            return Reply(status=fault, text="too many requests" if fault == 429 else "server error")
        if (method, path) == ("POST", "/login"):
            return self._login(body.get("pin", ""))
        if not self.token or token != self.token:
            return Reply(status=401, text="log in")
        if self.token_requests and not self.requests_left:
            return Reply(status=401, text="token expired")
        self.requests_left -= 1
        path, _, query = path.partition("?page=")
        match path.strip("/").split("/"):
            case [table] if method == "GET" and (table in self.tables or table == "people"):
                return self._page(table, int(query))
            case [table, row] if method == "GET" and table in self.tables:
                return self._row(table, int(row))
            case [table, row, action] if method == "POST" and (table, action) in ACTIONS:
                return self._act(table, int(row), action, body.get("value", ""))
        return Reply(status=404, text="no such route")

    def _login(self, pin: str) -> Reply:
        if pin != self.pin:
            return Reply(status=401, text="wrong pin")
        self.token = self.tokens[self.num_logins % len(self.tokens)]
        self.num_logins += 1
        self.requests_left = self.token_requests
        return Reply(status=200, text=self.token)

    def _page(self, table: str, page: int) -> Reply:
        lines = self.people if table == "people" else [f"{n} {row['title']}" for n, row in self.tables[table].items()]
        shown = lines[(page - 1) * PAGE_ROWS : page * PAGE_ROWS] if page > 0 else []
        return Reply(status=200, text="\n".join(shown)) if shown else Reply(status=404, text="no such page")

    def _row(self, table: str, row: int) -> Reply:
        if row not in self.tables[table]:
            return Reply(status=404, text="no such row")
        return Reply(status=200, text=" ".join(f"{field} {text}" for field, text in self.tables[table][row].items()))

    def _act(self, table: str, row: int, action: str, value: str) -> Reply:
        if row not in self.tables[table]:
            return Reply(status=404, text="no such row")
        if action == "assign" and value not in self.people:
            return Reply(status=422, text="no such person")
        field, text = ACTIONS[table, action]
        self.tables[table][row][field] = text or value
        return Reply(status=200, text="ok")


class OfficeServer:
    """Serves the offices of this process over HTTP on loopback, one address prefix each; runs while it has any."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _http: ClassVar[ThreadingHTTPServer | None] = None
    _offices: ClassVar[dict[str, Office]] = {}
    _count: ClassVar[int] = 0

    @classmethod
    def add(cls, office: Office) -> str:
        """Serve an office; returns its prefix, e.g. "/o7"."""
        with cls._lock:
            if cls._http is None:
                cls._http = _Listener((_HOST, 0), _Handler)
                threading.Thread(target=cls._http.serve_forever, args=(0.05,), name="shoal-office", daemon=True).start()
            cls._count += 1
            cls._offices[f"o{cls._count}"] = office
            return f"/o{cls._count}"

    @classmethod
    def remove(cls, prefix: str) -> None:
        """Stop serving it; the last one closes the socket. Unknown prefixes are ignored."""
        with cls._lock:
            cls._offices.pop(prefix[1:], None)
            if not cls._offices and cls._http is not None:
                cls._http.shutdown()
                cls._http.server_close()
                cls._http = None

    @classmethod
    def office(cls, key: str) -> Office | None:
        return cls._offices.get(key)

    @classmethod
    async def request(cls, method: str, path: str, token: str, body: dict[str, str]) -> Reply:
        """Send one request over a connection of its own. Raises OSError or TimeoutError."""
        assert cls._http is not None
        data = json.dumps(body).encode()  # ASCII, as is the token: whatever a policy wrote survives the trip
        head = f"{method} {path} HTTP/1.0\r\nX-Token: {json.dumps(token)}\r\nContent-Length: {len(data)}\r\n\r\n"
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(_HOST, cls._http.server_port)
            try:
                writer.write(head.encode() + data)
                answer = await reader.read()
            finally:
                writer.close()
        status_line, _, rest = answer.partition(b"\r\n")
        return Reply(status=int(status_line.split()[1]), text=json.loads(rest.partition(b"\r\n\r\n")[2]))


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S

    def _answer(self) -> None:
        _, key, path = self.path.split("/", 2)
        office = OfficeServer.office(key)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        token = json.loads(self.headers["X-Token"])
        gone = Reply(status=410, text="closed")
        reply = office.handle(self.command, f"/{path}", token, body) if office else gone
        data = json.dumps(reply.text).encode()
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """No access log: the transcript has it all."""
