"""Tools of MCP servers (Model Context Protocol) inside an environment: `class Notes(from_mcp(server)): ...`.

Each episode has a session of its own with each server: a process of its own over stdio, an own `Mcp-Session-Id` over
HTTP. An argument that does not fit the server's schema, a call that the server refuses and a call that takes too long
are observations. A server that is gone is an InfraFault, so the episode has no reward and may be tried again.
"""

import asyncio
import random
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from envs.adapters.mcp_connection import McpConnection
from envs.base import AgentEnv, Observation
from envs.errors import InfraFault, MalformedEnvironment
from envs.message import ToolSpec
from envs.tool import Tool

if TYPE_CHECKING:
    from mcp_types import Tool as ListedTool


_CONNECT_SHARE = 0.9
"""Of reset_timeout_s, for each server: what is late must be known as the server's fault before the reset is late."""


class McpEnv(AgentEnv):
    """An environment whose tools are those of MCP servers, and its own `@tool` methods.

    task(), reward() and tools of the class may be async and use `call_server`, e.g. to seed the server's state.
    """

    servers: ClassVar[tuple[Any, ...]] = ()
    """As in `from_mcp`."""
    hidden: ClassVar[frozenset[str]] = frozenset()
    """Names of tools that the policy does not see and cannot call."""

    _connections: list[McpConnection] | None = None

    if TYPE_CHECKING:  # wider than AgentEnv's: it may be async

        def task(self, rng: random.Random, level: int) -> Any: ...

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        await self._connect()
        return await super().areset(seed=seed, options=options)

    async def call_server(self, name: str, /, **arguments: Any) -> Any:
        """Call a tool, hidden or not, as the environment: its text, or a list of texts and images.

        Raises what `McpConnection.call` raises, and MalformedEnvironment where no server has the tool.
        """
        for connection in self._connections or ():
            if any(listed.name == name for listed in connection.tools):
                return await connection.call(name, arguments)
        raise MalformedEnvironment(f"{type(self).__name__}: no server has a tool {name!r}")

    def tools(self) -> Mapping[str, Tool]:
        found: dict[str, Tool] = dict(super().tools())
        for connection in self._connections or ():
            for listed in connection.tools:
                if listed.name in self.hidden:
                    continue
                if listed.name in found:
                    raise MalformedEnvironment(f"{type(self).__name__}: two tools are called {listed.name!r}")
                found[listed.name] = Tool.from_schema(_spec(listed), partial(_call, connection, listed.name))
        return found

    def close(self) -> None:
        connections = self._connections or []
        while connections:
            connections.pop().close()
        super().close()

    async def _connect(self) -> None:
        if self._connections is None:
            self._connections = []
            weakref.finalize(self, _stop, self._connections)  # a forgotten environment leaves no process
        while self._connections:
            await self._disconnect(self._connections.pop())
        limit_s = _CONNECT_SHARE * self.reset_timeout_s
        for server in self.servers:
            connection = McpConnection(server)
            self._connections.append(connection)  # first: close() also ends what did not open in time
            try:
                async with asyncio.timeout(limit_s):
                    await connection.open()
            except TimeoutError:
                raise InfraFault(f"MCP server {server!r:.200} did not open in {limit_s:g} s") from None

    async def _disconnect(self, connection: McpConnection) -> None:
        """The last episode may have run on another event loop: its session is closed there."""
        await asyncio.to_thread(connection.close)


def from_mcp(
    *servers: Any,
    hidden: Iterable[str] = (),
    task: Callable[..., Any] | None = None,
    reward: Callable[..., Any] | None = None,
    oracle: Callable[..., Any] | None = None,
) -> type[McpEnv]:
    """An environment class with the tools of MCP servers, to subclass or, with `task` and `reward`, to use as it is.

    A server is a command (["python", "server.py"], started for each episode; it inherits PATH and HOME but no other
    variable), an http(s) URL, a StdioServerParameters of the `mcp` package (for variables or a folder), or a function
    that makes an `mcp` server in this process. `hidden` names tools that only the environment calls.

    `task(env, rng, level)`, `reward(env, answer)` and `oracle(env)` are what the methods would be.
    Example: Notes = from_mcp(["python", "notes.py"], task=ask_for_a_note, reward=is_right)
    """
    given = {"task": task, "reward": reward, "oracle": oracle}
    functions = {name: function for name, function in given.items() if function is not None}
    members: dict[str, Any] = {**functions, "servers": servers, "hidden": frozenset(hidden)}
    if functions:  # it belongs to their module; where they are of several, to that of the last in the order above
        members["__module__"] = list(functions.values())[-1].__module__
    return type("McpTools", (McpEnv,), members)


def _spec(listed: "ListedTool") -> ToolSpec:
    description = (listed.description or listed.title or listed.name).strip()
    parameters = {"type": "object", "properties": {}, **listed.input_schema}
    return ToolSpec(name=listed.name, description=description, parameters=parameters)


async def _call(connection: McpConnection, name: str, /, **arguments: Any) -> Any:
    return await connection.call(name, arguments)


def _stop(connections: list[McpConnection]) -> None:
    for connection in connections:
        connection.stop()
