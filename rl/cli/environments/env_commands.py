"""`shoal env`: list, make, play, check and serve environments. Each subcommand imports what it needs when it runs."""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rl.cli.command import Command, CommandTable
from rl.runs.usage import UsageError

INTRODUCTION = """\
shoal env makes, plays and checks environments.

usage: shoal env COMMAND ...      shoal env COMMAND --help tells more and shows examples

{commands}
"""
ID_HELP = "Calculator-v0, module:Class or module:Id-v0"


def json_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")


def _list(args: Namespace) -> int:
    """Ids that need no module: built-in ones and those of installed packages."""
    from envs.registry import BUILT_IN, list_envs

    rows = [{"id": env_id, "builtin": env_id in BUILT_IN} for env_id in list_envs()]
    if args.json:
        print(json.dumps({"envs": rows}))
        return 0
    for row in rows:
        print(f"{row['id']:<24}{'built in' if row['builtin'] else 'from an installed package'}")
    print("\nyour own: shoal train env=module:Id-v0")
    return 0


def _id_argument(parser: ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help=ID_HELP)


def _kwargs_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--kwargs", default="{}", metavar="JSON", help="what its constructor is given: a JSON object")


def _kwargs(args: Namespace) -> dict[str, Any]:
    """Raises UsageError for what is no JSON object."""
    hint = f"""--kwargs takes a JSON object, such as '{{"max_turns": 4}}'; got {args.kwargs!r}"""
    try:
        found = json.loads(args.kwargs)
    except ValueError as error:
        raise UsageError(f"{hint}: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{hint}, which is none")
    return found


def _check_arguments(parser: ArgumentParser) -> None:
    _id_argument(parser)
    parser.add_argument("--levels", type=_levels, default=(), metavar="0,5,9", help="default: lowest, middle, highest")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="problems of each level (default: 20)")
    _kwargs_argument(parser)
    json_argument(parser)


def _levels(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _check(args: Namespace) -> int:
    from envs.registry import find_class

    kwargs = _kwargs(args)
    highest = find_class(args.id).levels - 1
    if args.seeds < 2 or not all(0 <= level <= highest for level in args.levels):
        raise UsageError(f"--levels of {args.id} are 0 to {highest}, --seeds 2 or more")
    from rl.cli.environments.env_check import main

    return main(args.id, levels=args.levels, num_seeds=args.seeds, kwargs=kwargs, as_json=args.json)


def _play_arguments(parser: ArgumentParser) -> None:
    _id_argument(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which problem (default: 0)")
    parser.add_argument("--level", type=int, default=0, metavar="N", help="how hard (default: 0)")
    _kwargs_argument(parser)


def _play(args: Namespace) -> int:
    from rl.cli.environments.env_play import play

    return play(args.id, kwargs=_kwargs(args), seed=args.seed, level=args.level)


def _new_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a module's name, as in my_shop")
    parser.add_argument("--path", default=".", metavar="DIR", help="where to put its folder (default: here)")


def _new(args: Namespace) -> int:
    from rl.cli.environments.scaffold import main

    return main(args.name, parent=Path(args.path))


def _serve_arguments(parser: ArgumentParser) -> None:
    _id_argument(parser)
    parser.add_argument("--as", dest="protocol", choices=sorted(_SERVERS), required=True, help="what clients speak")
    parser.add_argument("--transport", choices=("stdio", "http"), default="stdio", help="of mcp (default: stdio)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="on the loopback interface (default: free)")
    _kwargs_argument(parser)


def _serve_mcp(args: Namespace) -> int:
    from envs.adapters.mcp_server import serve_mcp

    serve_mcp(args.id, transport=args.transport, port=args.port, kwargs=_kwargs(args))
    return 0


def _serve_openenv(args: Namespace) -> int:
    from envs.adapters.openenv_server import serve_openenv

    def say_where(port: int) -> None:
        print(f"{args.id} is served at http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    serve_openenv(args.id, "127.0.0.1", args.port, kwargs=_kwargs(args), on_ready=say_where)
    return 0


_SERVERS = {"mcp": _serve_mcp, "openenv": _serve_openenv}


def _serve(args: Namespace) -> int:
    return _SERVERS[args.protocol](args)


ENV_COMMANDS = CommandTable(
    summary="list, make, play and check environments",
    introduction=INTRODUCTION,
    commands={
        "list": Command(
            summary="list environments that need no module",
            examples="  shoal env list\n  shoal env list --json",
            arguments=json_argument,
            run=_list,
        ),
        "new": Command(
            summary="write a working environment of your own, with a test",
            examples="  shoal env new my_shop\n  shoal env new my_shop --path ~/research",
            arguments=_new_arguments,
            run=_new,
        ),
        "play": Command(
            summary="play an environment in the terminal",
            examples="  shoal env play ShopDB-v0\n  shoal env play my_shop:MyShop --seed 7 --level 5",
            arguments=_play_arguments,
            run=_play,
        ),
        "check": Command(
            summary="look for what makes an environment teach the wrong thing, or fail in a long run",
            examples="  shoal env check my_shop:MyShop\n  shoal env check ShopDB-v0 --levels 0,5,9 --seeds 20 --json\n"
            "  shoal env check ApiDesk-v0 --kwargs '{\"http\": true}'",
            arguments=_check_arguments,
            run=_check,
        ),
        "serve": Command(
            summary="let clients of other ecosystems play an environment",
            examples="  shoal env serve ShopDB-v0 --as mcp\n  shoal env serve my_shop:MyShop --as mcp --transport http",
            arguments=_serve_arguments,
            run=_serve,
        ),
    },
)
