"""Commands and tables of commands, and how a command line finds its way to one."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from conf.keys import nearest

RUN_HELP = "an id, the unique beginning of one, a path, or 'latest'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command, e.g. `shoal ls`."""

    summary: str
    examples: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    """Returns the exit code."""
    takes_rest: bool = False
    """Its last argument takes all remaining words as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandTable:
    """Commands by name, e.g. those of `shoal env`."""

    summary: str
    introduction: str
    """Help; "{commands}" stands for the listing."""
    commands: "Mapping[str, Command | CommandTable]"


def run_words(program: str, table: CommandTable, words: Sequence[str]) -> int:
    """Run what `words` name in a table, e.g. run_words("shoal", table, ["env", "list"]); returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(len(name) for name in table.commands)
        listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in table.commands.items())
        print(table.introduction.format(commands=listing), end="")
        return 0 if words else 2
    name, *rest = words
    if name not in table.commands:
        known = ", ".join(table.commands)
        likely = nearest(name, table.commands, 0.5)
        print(f"{program}: unknown command {name!r}.{likely} Commands: {known}", file=sys.stderr)
        return 2
    command = table.commands[name]
    if isinstance(command, CommandTable):
        return run_words(f"{program} {name}", command, rest)
    parser = parser_of(f"{program} {name}", command)
    try:
        args = parser.parse_args(rest) if command.takes_rest else parser.parse_intermixed_args(rest)
    except SystemExit as stop:  # argparse has printed help (0) or what is wrong (2)
        return int(stop.code or 0)
    return command.run(args)


def parser_of(program: str, command: Command) -> ArgumentParser:
    """Example: parser_of("shoal ls", command).format_help()"""
    parser = ArgumentParser(
        prog=program,
        description=command.summary,
        epilog=f"examples:\n{command.examples}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    return parser


def reader_arguments(parser: ArgumentParser) -> None:
    """Of whatever reads the folder of runs."""
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--root", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")


def run_arguments(parser: ArgumentParser) -> None:
    """Of whatever reads one run."""
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    reader_arguments(parser)
