"""An environment of ours as an OpenEnv server: `shoal env serve ID --as openenv`.

Speaks OpenEnv's WebSocket protocol at /ws, one episode a connection, and answers GET /health, /schema and /metadata.
Actions are OpenEnv's tool calls: the environment's tools, and `submit`, which says the answer (or a word to the user
the environment plays). reset takes `seed` and `level`; equal ones give an equal problem. An observation that ends the
episode carries the reward and its parts.
"""

import asyncio
import base64
import http
import json
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

from envs.adapters.extra import load_extra
from envs.base import call, say
from envs.errors import BadArguments
from envs.message import ImagePart, Message, ToolSpec
from envs.outcome import StepOutcome
from envs.pool.pool import EnvPool
from envs.registry import check_arguments, find_class
from envs.task import Task
from envs.tool import Tool

logger = logging.getLogger(__name__)
EXTRA = "openenv"
_MAX_MESSAGE_BYTES = 2**20
_SEEDS = 2**31


def submit(answer: str) -> None:
    """Say the answer: the reward comes back, or what a user replies who wants to know more."""


SUBMIT = Tool.from_function(submit)


def serve_openenv(
    env_id: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    kwargs: Mapping[str, Any] | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve an environment until the process is interrupted; port 0 takes a free one, told to `on_ready`.

    Raises UnknownEnvironment, MalformedEnvironment, MissingExtra, and OSError where the port is taken.
    """
    check_arguments(env_id, find_class(env_id), kwargs or {})
    asyncio.run(_serve(OpenEnvServer(env_id, kwargs or {}), host, port, on_ready))


async def _serve(server: "OpenEnvServer", host: str, port: int, on_ready: Callable[[int], None] | None) -> None:
    websockets = load_extra("websockets.asyncio.server", EXTRA)
    listening = websockets.serve(
        server.handle, host, port, process_request=server.answer_http, max_size=_MAX_MESSAGE_BYTES
    )
    async with listening as running:
        if on_ready is not None:
            on_ready(running.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().create_future()


class OpenEnvServer:
    """Answers any number of connections from one pool of environments."""

    def __init__(self, env_id: str, kwargs: Mapping[str, Any]) -> None:
        self._env_id, self._kwargs = env_id, dict(kwargs)
        self._pool = EnvPool()
        self._num_sessions = 0

    async def handle(self, socket: Any) -> None:
        """One connection: reset, step and state in any order, until it closes."""
        self._num_sessions += 1
        session = _Session(self._pool, self._env_id, self._kwargs, key=f"openenv-{self._num_sessions}")
        try:
            async for raw in socket:
                reply = await session.answer(raw)
                if reply is None:
                    return
                await socket.send(json.dumps(reply))
        finally:
            await self._pool.close(session.key)

    def answer_http(self, connection: Any, request: Any) -> Any:
        """Pages beside the socket; None lets the WebSocket handshake go on."""
        path = request.path.partition("?")[0]
        pages: dict[str, Any] = {
            "/health": {"status": "healthy"},
            "/schema": {"action": _ACTION_SCHEMA, "observation": {"type": "object"}, "state": {"type": "object"}},
            "/metadata": {"name": self._env_id, "description": self._description(), "version": None},
        }
        if path == "/ws":
            return None
        if path not in pages:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "no such page\n")
        response = connection.respond(http.HTTPStatus.OK, json.dumps(pages[path]))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    def _description(self) -> str:
        return (find_class(self._env_id).__doc__ or "").strip().split("\n")[0]


_ACTION_SCHEMA: Mapping[str, Any] = {
    "title": "CallToolAction",
    "description": "Call a tool.",
    "type": "object",
    "properties": {
        "type": {"const": "call_tool", "default": "call_tool", "type": "string"},
        "tool_name": {"type": "string"},
        "arguments": {"type": "object"},
        "metadata": {"type": "object"},
    },
    "required": ["tool_name"],
}


class _Refused(ValueError):
    """A message that cannot be answered, as OpenEnv names it: `code`, text."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Session:
    """The episode of one connection."""

    def __init__(self, pool: EnvPool, env_id: str, kwargs: dict[str, Any], *, key: str) -> None:
        self.key = key
        self._pool, self._env_id, self._kwargs = pool, env_id, kwargs
        self._tools: tuple[ToolSpec, ...] = ()
        self._is_open = False
        self._num_steps = 0

    async def answer(self, raw: str | bytes) -> dict[str, Any] | None:
        """The reply to one message; None where the client said goodbye."""
        try:
            try:
                message = json.loads(raw)
                kind, data = message["type"], message.get("data") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise _Refused("INVALID_JSON", "a message is a JSON object with a type") from None
            if kind == "close":
                return None
            if kind == "reset":
                return {"type": "observation", "data": await self._reset(data)}
            if kind == "step":
                return {"type": "observation", "data": await self._step(data)}
            if kind == "state":
                return {"type": "state", "data": {"episode_id": self.key, "step_count": self._num_steps}}
            raise _Refused("UNKNOWN_TYPE", f"unknown message type {str(kind)[:40]!r}")
        except _Refused as refused:
            return {"type": "error", "data": {"message": str(refused), "code": refused.code}}

    async def _reset(self, data: Mapping[str, Any]) -> dict[str, Any]:
        await self._pool.close(self.key)
        seed, level = data.get("seed"), data.get("level", 0)
        if not all(isinstance(number, int) for number in (0 if seed is None else seed, level)):
            raise _Refused("VALIDATION_ERROR", "seed and level are integers")
        seed = random.randrange(_SEEDS) if seed is None else seed
        task = Task(
            task_id=self.key, env_id=self._env_id, env_name="openenv", seed=seed, level=level, kwargs=self._kwargs
        )
        outcome = await self._pool.open(self.key, task)
        if outcome.failure is not None:
            raise _Refused("EXECUTION_ERROR", outcome.failure.message)
        self._tools, self._is_open, self._num_steps = (*outcome.tools, SUBMIT.spec), True, 0
        return _observation({"messages": [_as_json(message) for message in outcome.messages], "seed": seed})

    async def _step(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if data.get("type") == "list_tools":
            listed = [{"name": t.name, "description": t.description, "input_schema": t.parameters} for t in self._tools]
            return _observation({"tools": listed})
        name, arguments = data.get("tool_name"), data.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _Refused("VALIDATION_ERROR", "an action is {type: call_tool, tool_name, arguments}")
        if not self._is_open:
            raise _Refused("EXECUTION_ERROR", "no episode is running, reset first")
        self._num_steps += 1
        try:
            message = say(SUBMIT.parse(arguments)["answer"]) if name == SUBMIT.spec.name else call(name, **arguments)
        except BadArguments as error:
            return _observation(_result(name, "", f"error: {error}", "bad_arguments"))
        outcome = await self._pool.step(self.key, message)
        if outcome.failure is not None:
            self._is_open = False
            raise _Refused("SESSION_ERROR", outcome.failure.message)
        return self._told(name, outcome)

    def _told(self, name: str, outcome: StepOutcome) -> dict[str, Any]:
        ended = outcome.reward is not None
        self._is_open = not ended
        text = "\n".join(message.text for message in outcome.messages)
        errors = [m.tool_result.error for m in outcome.messages if m.tool_result and m.tool_result.error]
        images = [_image(part) for m in outcome.messages for part in m.content if isinstance(part, ImagePart)]
        metadata = {"reward_parts": outcome.reward_parts, "truncated": outcome.truncated} if ended else {}
        if images:
            metadata["images"] = images
        observation = _result(name, text, text, errors[0] if errors else None)
        return _observation(observation, reward=outcome.reward, done=ended, metadata=metadata)


def _result(name: str, text: str, error_text: str, error: str | None) -> dict[str, Any]:
    kinds = {"unknown_tool": "tool_not_found", "bad_arguments": "invalid_args", "timeout": "timeout"}
    if error is None:
        return {"tool_name": name, "result": text, "error": None}
    told = {"error_type": kinds.get(error, "execution_error"), "message": error_text.removeprefix("error: ")}
    return {"tool_name": name, "result": None, "error": told}


def _observation(
    observation: dict[str, Any], *, reward: float | None = None, done: bool = False, metadata: Any = None
) -> dict[str, Any]:
    metadata = metadata or {}
    return {"observation": {**observation, "metadata": metadata}, "reward": reward, "done": done, "metadata": metadata}


def _as_json(message: Message) -> dict[str, Any]:
    images = [_image(part) for part in message.content if isinstance(part, ImagePart)]
    return {"role": message.role, "content": message.text, **({"images": images} if images else {})}


def _image(part: ImagePart) -> dict[str, str]:
    return {"media_type": part.media_type, "data": base64.b64encode(part.data).decode()}
