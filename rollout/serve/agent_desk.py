"""Where sessions wait for agents, and the HTTP face that agents call: OpenAI's chat completions plus session calls.

POST   /v1/sessions                 take the next session (training), or make one (`shoal serve`)
POST   /v1/chat/completions         sample a turn; header x-shoal-session, or base URL /sessions/ID/v1; without either,
                                    of a session that is made for the conversation (`shoal serve`)
POST   /v1/sessions/ID/reward       {"reward": 1.0, "parts": {...}} or {"answer": "42"}: end it
DELETE /v1/sessions/ID              abort it: a failed episode, never reward 0
GET    /v1/models, /v1/models/ID, /health
"""

import asyncio
import hashlib
import hmac
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rollout.serve.chat_answer import answer_json, chunks, message_json, tool_json
from rollout.serve.chat_request import MODEL, ApiError, ChatRequest, read_chat, read_reward
from rollout.serve.serving_session import ServedSession, SessionEnd

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_BODY_BYTES = 8 * 2**20
LONG_POLL_S = 10.0
"""How long a call for a session waits before it is told that there is none yet."""
GRACE_S = 2
KEEP_ALIVE_S = 3600
"""Longer than a client keeps an idle connection: a server that closes first loses requests that are on their way."""
RETRY_HEADERS = ("x-stainless-retry-count", "x-retry-count")
"""More than 0: the client's library sends this request again."""

MODEL_JSON = {"id": MODEL, "object": "model", "created": 0, "owned_by": "shoal"}
MakeSession = Callable[[dict[str, Any]], Awaitable[ServedSession]]


class AgentDesk:
    """Example: desk.offer(session); (await desk.take("agent-0")) is session; desk.find(session.session_id)."""

    def __init__(self, *, hosts: tuple[str, ...] = (), tokens: dict[str, str] | None = None) -> None:
        """`hosts`: names that a Host header may give beside loopback's. `tokens`: API key -> who holds it; empty = any
        key is good, for loopback alone."""
        self.tokens = tokens or {}
        self.make_session: MakeSession | None = None
        """Makes the session a client asks for; None = clients take what is offered."""
        self.address = ""
        """"http://127.0.0.1:PORT", once it listens."""
        self._hosts = (*LOOPBACK, *hosts)
        self._sessions: dict[str, ServedSession] = {}
        self._waiting: deque[ServedSession] = deque()
        self._offered = asyncio.Condition()
        self._news: asyncio.Task[None] | None = None
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._closing = False
        self._unnamed: list[ServedSession] = []

    # --- sessions ---

    def session_ids(self) -> list[str]:
        """Of open sessions."""
        return list(self._sessions)

    def open(self, session: ServedSession) -> None:
        """From now on requests find it."""
        self._sessions[session.session_id] = session

    def offer(self, session: ServedSession) -> None:
        """Open it and queue it for an agent."""
        self.open(session)
        self._waiting.append(session)
        self._news = asyncio.get_running_loop().create_task(self._wake())

    def forget(self, session: ServedSession) -> None:
        self._sessions.pop(session.session_id, None)
        if session in self._unnamed:
            self._unnamed.remove(session)
        with suppress(ValueError):
            self._waiting.remove(session)

    async def _wake(self) -> None:
        async with self._offered:
            self._offered.notify_all()

    async def take(self, holder: str, wait_s: float = LONG_POLL_S) -> ServedSession | None:
        """The session that waits longest; None where none came in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._offered:
                await self._offered.wait_for(lambda: bool(self._waiting) or self._closing)
                if self._closing:
                    return None
                session = self._waiting.popleft()
                session.holder = holder
                return session
        return None

    def find(self, session_id: str) -> ServedSession:
        """Raises `ApiError` where there is none."""
        if session_id not in self._sessions:
            raise ApiError(f"no session {session_id[:100]!r} is open", code=404)
        return self._sessions[session_id]

    def lose(self, holder: str, why: str) -> None:
        """Every session that `holder` took ends as lost: its process is gone."""
        for session in list(self._sessions.values()):
            if session.holder == holder and not session.ended.done():
                session.finish(SessionEnd(kind="lost", text=why))

    # --- the server ---

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Serve on this loop until `close`. OSError where the port is taken, `ValueError` for a missing extra."""
        try:
            import uvicorn
        except ModuleNotFoundError as error:
            raise ValueError(f"serving agents needs {error.name}: pip install 'shoal[serve]'") from None
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self.app(), log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off"
        )
        config.timeout_keep_alive = KEEP_ALIVE_S
        config.timeout_graceful_shutdown = GRACE_S
        self._server = _server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def close(self) -> None:
        """Stop listening; safe to call twice."""
        self._closing = True
        await self._wake()  # calls that wait for a session end now
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._serving, GRACE_S + 5)
            self._server = None

    def app(self) -> "ASGIApp":
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        return Starlette(
            routes=[
                Route("/health", self._answer(self._health)),
                Route("/v1/models", self._answer(self._models)),
                Route("/v1/models/{model}", self._answer(self._model)),
                Route("/v1/sessions", self._answer(self._new), methods=["POST"]),
                Route("/v1/sessions/{id}/reward", self._answer(self._reward), methods=["POST"]),
                Route("/v1/sessions/{id}", self._answer(self._abort), methods=["DELETE"]),
                Route("/v1/chat/completions", self._answer(self._chat), methods=["POST"]),
                Route("/sessions/{id}/v1/chat/completions", self._answer(self._chat), methods=["POST"]),
                Route("/sessions/{id}/v1/models", self._answer(self._models)),
                Route("/sessions/{id}/v1/models/{model}", self._answer(self._model)),
            ],
            exception_handlers={HTTPException: _http_error, Exception: _failure},
        )

    def _answer(self, ask: "Callable[[Request, str], Awaitable[Response]]") -> Any:
        from starlette.responses import JSONResponse

        async def endpoint(request: "Request") -> "Response":
            try:
                return await ask(request, self._holder(request))
            except ApiError as error:
                return JSONResponse(error.body(), error.code)

        return endpoint

    def _holder(self, request: "Request") -> str:
        """Who asks. Raises `ApiError` for another site's page, another server's name or a wrong key."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if _hostname(f"//{host}") not in self._hosts:
            raise ApiError(f"the Host {host[:100]!r} is not this server", code=403)
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(f"the Origin {origin[:100]!r} is another site", code=403)
        if not self.tokens:
            return "client"
        _, _, sent = request.headers.get("authorization", "").partition(" ")
        for token, holder in self.tokens.items():
            if hmac.compare_digest(token.encode(), sent.encode()):
                return holder
        raise ApiError(
            "the API key is not the one this endpoint was started with", code=401, kind="authentication_error"
        )

    # --- answers ---

    async def _models(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [MODEL_JSON]})

    async def _model(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        name = request.path_params["model"]
        if name != MODEL:
            raise ApiError(f"there is no model {name[:100]!r}; this endpoint serves {MODEL!r}", code=404, param="model")
        return JSONResponse(MODEL_JSON)

    async def _health(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok", "sessions": len(self._sessions)})

    async def _new(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        body = await _body(request)
        if self.make_session is not None:
            session = await self.make_session(body)
        else:
            session = await self.take(holder)
        if session is None:
            return JSONResponse({"session_id": None})
        task = session.facts | {
            "messages": [message_json(message) for message in session.env_messages],
            "tools": [tool_json(tool) for tool in session.env_tools],
        }
        answer = {
            "session_id": session.session_id,
            "base_url": f"{self.address}/sessions/{session.session_id}/v1",
            "model": MODEL,
            "deadline_s": session.left_s,
            "task": task if session.env_messages else None,
        }
        return JSONResponse(answer)

    async def _reward(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        session, body = self.find(request.path_params["id"]), await _body(request)
        if ("answer" in body) == ("reward" in body):
            raise ApiError("send either a reward or an answer")
        if "answer" in body:
            if not session.env_messages or not isinstance(body["answer"], str):
                raise ApiError("an answer is a text, and needs a session with a task to score it", param="answer")
            session.finish(SessionEnd(kind="answer", text=body["answer"]))
        else:
            reward, parts = read_reward(body)
            session.finish(SessionEnd(kind="reward", reward=reward, parts=parts))
        return JSONResponse({"session_id": session.session_id, "ended": True})

    async def _abort(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse

        session = self.find(request.path_params["id"])
        session.finish(SessionEnd(kind="abort", text="aborted by the client"))
        return JSONResponse({"session_id": session.session_id, "ended": True})

    async def _chat(self, request: "Request", holder: str) -> "Response":
        from starlette.responses import JSONResponse, StreamingResponse

        session_id = request.path_params.get("id") or request.headers.get("x-shoal-session", "")
        body = await _body(request)
        chat = read_chat(body)
        session = self.find(session_id) if session_id else await self._session_of(chat, holder)
        answer = await session.answer(chat, _digest(body), is_retry=_is_retry(request), is_gone=request.is_disconnected)
        turns = await asyncio.shield(answer.turns)
        if not chat.stream:
            answer.arrived = not await request.is_disconnected()
            return JSONResponse(answer_json(turns, chat))

        async def events() -> AsyncIterator[str]:
            answer.arrived = False  # until the last chunk has gone
            for chunk in chunks(turns, chat):
                yield f"data: {json.dumps(chunk)}\n\n"
            answer.arrived = not await request.is_disconnected()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _session_of(self, chat: ChatRequest, holder: str) -> ServedSession:
        """Of a request that names none: the one session that its sender holds; where sessions are made on request, that
        of the conversation it continues, or a new one. Raises `ApiError` where more than one could be meant."""
        if self.make_session is not None:
            going_on = (session for session in self._unnamed if session.is_continued_by(chat))
            session = next(going_on, None)
            if session is None:
                session = await self.make_session({})
                self._unnamed.append(session)
            return session
        held = [session for session in self._sessions.values() if session.holder == holder]
        if len(held) != 1:
            raise ApiError(
                f"which session? you hold {len(held)}: send the header x-shoal-session, or use the base_url of "
                "POST /v1/sessions"
            )
        return held[0]


async def _body(request: "Request") -> dict[str, Any]:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError(f"the body is longer than {MAX_BODY_BYTES} bytes", code=413)
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        raise ApiError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    """Equal for requests that ask for the same."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_retry(request: "Request") -> bool:
    sent = (request.headers.get(name, "") for name in RETRY_HEADERS)
    return any(value.isdecimal() and int(value) > 0 for value in sent)


async def _http_error(request: "Request", error: Any) -> "Response":
    """An address or a method that is not served, in the words that clients can read."""
    from starlette.responses import JSONResponse

    words = {404: f"there is no {request.url.path[:200]!r} here", 405: f"{request.method} is not served here"}
    return JSONResponse(ApiError(words.get(error.status_code) or str(error.detail)).body(), error.status_code)


async def _failure(request: "Request", error: Exception) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(ApiError(f"the server failed: {type(error).__name__}", code=500).body(), 500)


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _server(config: "uvicorn.Config") -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to the process it runs in."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)
