"""A stateful MCP server for tests, on the SDK: `python mcp_notes.py [http]`. Each session has notes of its own.

Over HTTP it serves on a free port of the loopback interface and prints its URL.
"""

import asyncio
import os
import random
import socket
import sys

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

WORDS = ("tea", "rain", "moss", "salt", "wool", "iron")
PNG = b"\x89PNG not really"


def make_server() -> MCPServer:
    server = MCPServer("notes")
    notes: dict[str | None, list[str]] = {}

    def mine(context: Context) -> list[str]:
        return notes.setdefault((context.headers or {}).get("mcp-session-id"), [])

    @server.tool()
    def start(seed: int, count: int, context: Context) -> None:
        """Fill the notebook (for the environment, not for the policy)."""
        mine(context)[:] = [f"{WORDS[i]} {random.Random(f'{seed}/{i}').randint(100, 999)}" for i in range(count)]

    @server.tool()
    def read(index: int, context: Context) -> str:
        """Read one note."""
        return mine(context)[index]

    @server.tool()
    def write(text: str, context: Context, urgent: bool = False) -> int:
        """Add a note and return how many there are."""
        mine(context).append(text.upper() if urgent else text)
        return len(mine(context))

    @server.tool()
    def refuse(reason: str) -> str:
        """Refuse, for a reason."""
        raise ToolError(f"no: {reason}")

    @server.tool()
    def picture() -> list:
        """A text and an image."""
        return ["look", Image(data=PNG, format="png")]

    @server.tool()
    async def doze(seconds: float) -> str:
        """Take a while."""
        await asyncio.sleep(seconds)
        return "slept"

    @server.tool()
    def die() -> None:
        """End the server's process at once."""
        os._exit(1)

    return server


async def serve_http() -> None:
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp", flush=True)
    config = uvicorn.Config(make_server().streamable_http_app(), log_level="warning", timeout_graceful_shutdown=1)
    await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    if sys.argv[1:] == ["http"]:
        asyncio.run(serve_http())
    else:
        make_server().run("stdio")
