"""Starts the server and ends it."""

import asyncio
import socket
import webbrowser
from pathlib import Path

import uvicorn

from rl.dashboard.security import Access
from rl.dashboard.server import Stop, make_app
from rl.runs.usage import UsageError

GRACE_S = 2
"""Seconds that open answers get when the server ends."""


class _Server(uvicorn.Server):
    """Ends open streams with itself: uvicorn would wait for them."""

    def __init__(self, config: uvicorn.Config, stop: Stop) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: object) -> None:
        self._stop.is_set = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]  # uvicorn names the frame's type privately


def serve(root: Path, host: str, port: int, access: Access, *, open_browser: bool = False) -> int:
    """Serve until Ctrl-C or SIGTERM. Raises `UsageError` where the port is taken."""
    stop = Stop()
    app = make_app(root, access, stop)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # whoever reads the address below may ask at once
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; --port 0 takes a free port") from None
    address = f"http://{_shown(host, access)}:{listener.getsockname()[1]}/"
    address += f"?token={access.token}" if access.token else ""
    print(address, flush=True)
    if open_browser:
        webbrowser.open(address)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, server_header=False, ws="none"
    )
    asyncio.run(_Server(config, stop).serve(sockets=[listener]))
    return 0


def _shown(host: str, access: Access) -> str:
    """A name that a browser can ask for and `access` allows."""
    name = access.hosts[0] if host in ("0.0.0.0", "::") and access.hosts else host
    name = "127.0.0.1" if name in ("0.0.0.0", "::") else name
    return f"[{name}]" if ":" in name else name
