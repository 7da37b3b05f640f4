"""Commands that look at runs and at this machine and change nothing in either."""

from argparse import ArgumentParser, Namespace

from rl.command import RUN_HELP, Command, reader_arguments, run_arguments
from rl.completion import SCRIPTS
from rl.usage import UsageError


def _audit(args: Namespace) -> int:
    from rl.audit import audit

    return audit(args.run, root=args.root, as_json=args.json)


def _diff_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("a", metavar="RUN", help=RUN_HELP)
    parser.add_argument("b", metavar="RUN", help="the other one")
    reader_arguments(parser)


def _diff(args: Namespace) -> int:
    from rl.diff import diff

    return diff(args.a, args.b, root=args.root, as_json=args.json)


def _completion_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help="print its script; `words` is what scripts call")
    parser.add_argument("line", nargs="?", help="with `words`: the command line so far")


def _completion(args: Namespace) -> int:
    if args.shell != "words":
        print(SCRIPTS[args.shell], end="")
        return 0
    if args.line is None:
        raise UsageError("shoal completion words needs the command line so far, as one argument")
    from rl.cli import SHOAL
    from rl.completion import candidates

    print("\n".join(candidates(args.line, SHOAL)))
    return 0


READER_COMMANDS: dict[str, Command] = {
    "diff": Command(
        summary="in which settings, versions and results two runs differ",
        examples="  shoal diff latest 20261123-1502\n  shoal diff runs/a /mnt/elsewhere/runs/b --json",
        arguments=_diff_arguments,
        run=_diff,
    ),
    "audit": Command(
        summary="where every group of a run stands: trained on once, or dropped for a reason",
        examples="  shoal audit latest\n  shoal audit latest --json        exit code 1: it does not balance",
        arguments=run_arguments,
        run=_audit,
    ),
    "completion": Command(
        summary="a script that completes shoal's words in bash, zsh or fish",
        examples="  source <(shoal completion bash)               for this shell\n"
        "  shoal completion bash > ~/.local/share/bash-completion/completions/shoal\n"
        "  shoal completion zsh > ~/.zfunc/_shoal        a folder of $fpath\n"
        "  shoal completion fish > ~/.config/fish/completions/shoal.fish",
        arguments=_completion_arguments,
        run=_completion,
    ),
}
