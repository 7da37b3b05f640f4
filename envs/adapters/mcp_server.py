"""Any environment as an MCP server: `serve_mcp("ShopDB-v0")`, or `shoal env serve ShopDB-v0 --as mcp`.

A client calls `reset(seed, level)`, which shows the problem, then the environment's tools, and at last
`submit(answer)`, which tells the reward. Each client session has an instance of its own, and its calls run one after
the other. What an author's code does wrong is an error of the call, which names it; the server lives on.
"""

import asyncio
import base64
import dataclasses
import json
import random
import socket
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from envs.adapters.extra import load_extra
from envs.base import say
from envs.errors import BadArguments, MalformedEnvironment
from envs.message import ImagePart, Message, TextPart, ToolCall, ToolSpec
from envs.outcome import EnvFailure, StepOutcome
from envs.pool.pool import EnvPool
from envs.registry import check_arguments, find_class
from envs.task import Task
from envs.tool import Tool, tools_of_class

if TYPE_CHECKING:
    from mcp.server import ServerRequestContext
    from mcp_types import CallToolResult

HOST = "127.0.0.1"
_SEEDS = 2**31


def reset(seed: int | None = None, level: int = 0) -> None:
    """Start an episode and read its problem. Equal seed and level give an equal problem."""


def submit(answer: str) -> None:
    """Say the answer: the reward comes back, or what a user replies who wants to know more."""


OWN_TOOLS: Mapping[str, Tool] = {function.__name__: Tool.from_function(function) for function in (reset, submit)}


@dataclasses.dataclass(slots=True)
class _Session:
    """What a client has open."""

    key: str
    tools: tuple[ToolSpec, ...]
    """Those of the class until an episode has said which it has."""
    is_open: bool = False
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class McpEnvServer:
    """Answers the requests of any number of sessions. `server` is the SDK's object, to be run over a transport."""

    def __init__(self, env_id: str, kwargs: Mapping[str, Any] | None = None) -> None:
        """Raises UnknownEnvironment or MalformedEnvironment for what cannot be served."""
        load_extra("mcp", "mcp")
        from mcp.server import Server
        from mcp_types import RequestParams

        owner = find_class(env_id)
        self._env_id = env_id
        self._kwargs = dict(kwargs or {})
        check_arguments(env_id, owner, self._kwargs)
        self._class_tools = tuple(found.spec for found in tools_of_class(owner))
        _refuse_clashes(env_id, self._class_tools)
        self._pool = EnvPool()
        self._num_sessions = 0
        instructions = (owner.__doc__ or env_id).strip().splitlines()[0]
        self.server: Server[Any] = Server(
            env_id.replace(":", "."),
            instructions=f"{instructions} Call reset first, submit last.",
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
        )
        self.server.add_request_handler("server/discover", RequestParams, self._discover)

    async def close(self) -> None:
        await self._pool.close_all()

    async def _discover(self, context: "ServerRequestContext", params: Any) -> Any:
        """Say that only the handshake is spoken: the protocol of 2026-07-28 has no sessions, and so no episodes."""
        from mcp_types import DiscoverResult
        from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

        return DiscoverResult(
            supported_versions=list(HANDSHAKE_PROTOCOL_VERSIONS), capabilities=self.server.get_capabilities()
        )

    async def _list_tools(self, context: "ServerRequestContext", params: Any) -> Any:
        from mcp_types import ListToolsResult
        from mcp_types import Tool as ListedTool

        offered = (OWN_TOOLS["reset"].spec, *self._session(context).tools, OWN_TOOLS["submit"].spec)
        tools = [ListedTool(name=s.name, description=s.description, input_schema=s.parameters) for s in offered]
        return ListToolsResult(tools=tools)

    async def _call_tool(self, context: "ServerRequestContext", params: Any) -> "CallToolResult":
        session = self._session(context)
        async with session.turn:
            return await self._answer(session, params.name, params.arguments or {})

    async def _answer(self, session: _Session, name: str, arguments: dict[str, Any]) -> "CallToolResult":
        if name not in OWN_TOOLS:
            return await self._step(session, Message.assistant(calls=[ToolCall(name=name, arguments=arguments)]))
        try:
            arguments = OWN_TOOLS[name].parse(arguments)
        except BadArguments as error:
            return _result([TextPart(text=f"error: {error}")], is_error=True)
        if name == "reset":
            return await self._reset(session, **arguments)
        return await self._step(session, say(arguments["answer"]))

    async def _reset(self, session: _Session, seed: int | None, level: int) -> "CallToolResult":
        seed = random.randrange(_SEEDS) if seed is None else seed
        task = Task(
            task_id=session.key, env_id=self._env_id, env_name="mcp", seed=seed, level=level, kwargs=self._kwargs
        )
        outcome = await self._pool.open(session.key, task)
        session.is_open = outcome.failure is None
        if outcome.failure is not None:
            return _failed(outcome.failure)
        _refuse_clashes(self._env_id, outcome.tools)
        session.tools = outcome.tools
        return _result([part for message in outcome.messages for part in message.content])

    async def _step(self, session: _Session, message: Message) -> "CallToolResult":
        if not session.is_open:
            return _result([TextPart(text="error: no episode is running, call reset")], is_error=True)
        outcome = await self._pool.step(session.key, message)
        if outcome.failure is not None or outcome.reward is not None:
            session.is_open = False
            await self._pool.close(session.key)
        if outcome.failure is not None:
            return _failed(outcome.failure)
        parts = [part for reply in outcome.messages for part in reply.content]
        is_error = any(reply.tool_result is not None and reply.tool_result.error for reply in outcome.messages)
        return _result(parts, is_error=is_error, outcome=outcome)

    def _session(self, context: "ServerRequestContext") -> _Session:
        # Private, but the SDK names the connection's state and exit stack as the place for what a connection owns.
        connection = context.session._connection
        if "shoal" not in connection.state:
            self._num_sessions += 1
            session = connection.state["shoal"] = _Session(key=str(self._num_sessions), tools=self._class_tools)
            connection.exit_stack.push_async_callback(self._pool.close, session.key)
        return connection.state["shoal"]


def serve_mcp(env_id: str, *, transport: str = "stdio", port: int = 0, kwargs: Mapping[str, Any] | None = None) -> None:
    """Serve an environment until standard input ends ("stdio") or the process is interrupted ("http").

    HTTP is served on the loopback interface only; port 0 takes a free one. The URL is printed to standard error.
    `kwargs` go to the environment's constructor. Raises as McpEnvServer, and OSError where the port is taken.
    """
    serve = {"stdio": _serve_stdio, "http": _serve_http}
    if transport not in serve:
        raise ValueError(f"transport {transport!r} is not one of {', '.join(serve)}")
    asyncio.run(serve[transport](McpEnvServer(env_id, kwargs), port))


async def _serve_stdio(environment: McpEnvServer, port: int) -> None:
    from mcp import stdio_server
    from mcp.server.runner import serve_loop  # Server.run() would settle on the protocol of 2026-07-28 if asked

    try:
        async with stdio_server() as (incoming, outgoing):
            await serve_loop(environment.server, incoming, outgoing, lifespan_state={})
    finally:
        await environment.close()


async def _serve_http(environment: McpEnvServer, port: int) -> None:
    import uvicorn

    with closing(socket.create_server((HOST, port))) as listening:
        print(f"http://{HOST}:{listening.getsockname()[1]}/mcp", file=sys.stderr, flush=True)
        application = environment.server.streamable_http_app(host=HOST)
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=2)
        try:
            await uvicorn.Server(config).serve(sockets=[listening])
        finally:
            await environment.close()


def _refuse_clashes(env_id: str, tools: tuple[ToolSpec, ...]) -> None:
    if clashes := sorted(OWN_TOOLS.keys() & {spec.name for spec in tools}):
        raise MalformedEnvironment(f"{env_id}: its tool {clashes[0]!r} is called like one of the server's own")


def _failed(failure: EnvFailure) -> "CallToolResult":
    text = f"error: the environment failed ({failure.where}): {failure.message}"
    return _result([TextPart(text=text)], is_error=True)


def _result(
    parts: "list[TextPart | ImagePart]", *, is_error: bool = False, outcome: StepOutcome | None = None
) -> "CallToolResult":
    """Parts as MCP content; the end of an episode is a JSON text and, the same, structured content."""
    from mcp_types import CallToolResult, ImageContent, TextContent

    content: list[Any] = []
    for part in parts:
        if isinstance(part, TextPart):
            content.append(TextContent(text=part.text))
        else:
            data = base64.b64encode(part.data).decode()
            content.append(ImageContent(data=data, mime_type=part.media_type))
    ended = None
    if outcome is not None and outcome.reward is not None:
        ended = {"reward": outcome.reward, "reward_parts": outcome.reward_parts, "truncated": outcome.truncated}
        content.append(TextContent(text=json.dumps(ended)))
    return CallToolResult(content=content, structured_content=ended, is_error=is_error)
