"""`shoal dash`: starts the dashboard."""

import secrets
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rl.cli.command import Command
from rl.runs.usage import UsageError

PORT = 8765


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--root", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: loopback, this machine alone")
    parser.add_argument("--name", action="append", default=[], metavar="NAME", help="a host name that browsers may use")
    parser.add_argument("--token", default="", metavar="TEXT", help="default: a new one at every start")
    parser.add_argument(
        "--no-token", action="store_true", help="on loopback only: every user of this machine may read the runs"
    )
    parser.add_argument("--open", action="store_true", help="open a browser")


def _dash(args: Namespace) -> int:
    root = Path(args.root)
    if not root.is_dir():
        raise UsageError(f"no folder {args.root!r}: shoal train env=calculator makes runs/; --root names another")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is 0 to 65535; got {args.port}")
    try:
        import plotly  # noqa: F401 (only its JavaScript is used; missing is told here, not in the browser)
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"shoal dash needs {error.name}: pip install 'shoal[dash]'") from None
    from rl.dashboard.launch import serve
    from rl.dashboard.security import Access, is_loopback

    if args.no_token and (args.token or not is_loopback(args.host)):
        raise UsageError("--no-token is for loopback alone, and not beside --token: others would read the runs")
    token = "" if args.no_token else args.token or secrets.token_urlsafe(24)
    names = tuple(name.lower() for name in (*args.name, args.host) if name not in ("0.0.0.0", "::"))
    print("shoal dash: Ctrl-C ends it", file=sys.stderr)
    return serve(root, args.host, args.port, Access(hosts=names, token=token), open_browser=args.open)


DASH = Command(
    summary="the dashboard: a page over all runs, live",
    examples="  shoal dash\n  shoal dash --open\n  shoal dash --root /backup/runs --port 0\n"
    "  ssh -L 8765:127.0.0.1:8765 gpu-box      then open the address that it printed, here\n"
    "  shoal dash --host 0.0.0.0 --name gpu-box      for other machines; the token is in the address",
    arguments=_arguments,
    run=_dash,
)
