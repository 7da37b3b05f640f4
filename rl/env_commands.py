"""`shoal env`: list, make, play, check and serve environments. Each subcommand imports what it needs when it runs."""

import json
from argparse import ArgumentParser, Namespace

from rl.command import Command, CommandTable

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
    },
)
