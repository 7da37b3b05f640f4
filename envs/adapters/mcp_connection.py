"""One session with one MCP server, usable from any task of the event loop it was opened on.

A session must be closed by the task that opened it (the SDK's task groups insist), but an environment is reset, stepped
and closed by different tasks, and closed from other threads. So a task of its own holds each session open until
`close`, and every wait is bounded: opening by its caller, calls by theirs, closing by CLOSE_TIMEOUT_S.
"""

import asyncio
import base64
import contextlib
import json
import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from envs.adapters.extra import load_extra
from envs.errors import InfraFault
from envs.message import ImagePart

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult, Tool

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 8.0
"""More than the SDK gives a process to end by itself, after SIGTERM and after SIGKILL."""
_PING_TIMEOUT_S = 5.0


class McpConnection:
    """One session. Example: c = McpConnection(server); await c.open(); await c.call("add", {"a": 1}); c.close()"""

    def __init__(self, server: Any) -> None:
        """`server` as in `from_mcp`."""
        self.tools: tuple[Tool, ...] = ()
        """What the server offered when the session was opened."""
        self._server = server
        self._owner: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect and list the tools. Raises InfraFault where that fails; the caller bounds the wait, and closes."""
        client = make_client(self._server)
        from anyio import CancelScope

        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._scope = CancelScope()
        self._ready: asyncio.Future[Client] = self._loop.create_future()
        self._owner = asyncio.create_task(self._hold(client))
        self._client = await asyncio.shield(self._ready)

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """What the tool shows: text, or a list of texts and images.

        Raises McpRefusal where server or tool refuse, and InfraFault where the server is gone or breaks the protocol.
        """
        from mcp import MCPError

        try:
            result = await self._client.call_tool(name, arguments)
        except MCPError as error:
            if await self._is_alive():
                raise McpRefusal(error.message) from None
            raise InfraFault(f"the MCP server is gone: {error.message}") from error
        except Exception as error:  # the SDK passes on errors of transports and of malformed results as they are
            raise InfraFault(f"the MCP server failed: {_leaf(error)!r}") from error
        shown = content_of(result)
        if result.is_error:
            raise McpRefusal(shown if isinstance(shown, str) else "\n".join(p for p in shown if isinstance(p, str)))
        return shown

    def stop(self) -> None:
        """Ask the session to end, from any thread, without waiting."""
        if self._owner is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and has cancelled its tasks before
                self._loop.call_soon_threadsafe(self._end)

    async def aclose(self) -> None:
        """End the session and wait until its process or connection is gone, at most CLOSE_TIMEOUT_S."""
        if self._owner is not None:
            self._end()
            await asyncio.wait({self._owner}, timeout=CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """As `aclose` from another thread. On the loop's own thread it does not wait."""
        if self._owner is None:
            return
        self.stop()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is not self._loop and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.aclose(), self._loop).result(CLOSE_TIMEOUT_S + 1.0)

    def _end(self) -> None:
        """A session that stands is ended politely; one that is still being opened is cut, through the SDK's own
        scopes: cancelling the task would break the shield under which they kill the process."""
        self._stop.set() if self._ready.done() else self._scope.cancel()

    async def _hold(self, client: "Client") -> None:
        try:
            with self._scope:
                async with client:
                    self.tools = await _list_tools(client)
                    self._ready.set_result(client)
                    await self._stop.wait()
        except Exception as error:  # transports raise whatever their sockets and processes raise
            if self._ready.done():
                logger.info("an MCP session ended with %r", _leaf(error))
            else:
                text = f"cannot open MCP server {self._server!r:.200}: {_leaf(error)!r}"
                self._ready.set_exception(InfraFault(text))
        finally:
            self._ready.cancel()

    async def _is_alive(self) -> bool:
        """Whether the session still answers: an error of a gateway or of a restarted server is no refusal."""
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                await self._client.session.send_ping()
        except Exception:  # see `call`
            return False
        return True


class McpRefusal(ValueError):
    """The server or a tool refused a call; the text is the server's, and the policy reads it."""


def make_client(server: Any) -> "Client":
    load_extra("mcp", "mcp")
    from mcp import Client, StdioServerParameters, stdio_client

    if isinstance(server, str) and not server.startswith(("http://", "https://")):
        raise ValueError(f"server {server!r:.200} is no http(s) URL; a command is a list: ['python', 'server.py']")
    if isinstance(server, list | tuple):
        server = StdioServerParameters(command=str(server[0]), args=[str(word) for word in server[1:]])
    if isinstance(server, StdioServerParameters):
        server = stdio_client(server, errlog=cast(TextIO, sys.__stderr__))
    elif callable(server):
        server = server()
    # "legacy" is the handshake that opens a session. The protocol of 2026-07-28 knows none: over HTTP nothing would
    # tell two episodes apart.
    return Client(server, mode="legacy", cache=None)


def content_of(result: "CallToolResult") -> Any:
    """Text and images of a result: text, or a list of texts and ImageParts where there is an image."""
    parts: list[Any] = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "image":
            parts.append(ImagePart(data=base64.b64decode(block.data), media_type=block.mime_type))
        elif block.type == "resource" and (text := block.resource.model_dump().get("text")) is not None:
            parts.append(text)
        else:
            parts.append(f"({block.type} not shown)")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False, separators=(",", ":"))
    return parts if any(isinstance(part, ImagePart) for part in parts) else "\n".join(parts)


async def _list_tools(client: "Client") -> "tuple[Tool, ...]":
    found: list[Tool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tuple(found)


def _leaf(error: BaseException) -> BaseException:
    """What went wrong inside the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
