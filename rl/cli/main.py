"""The `shoal` command. Each subcommand imports what it needs when it runs, so that help and errors come at once.

Exit codes: 0 ok, 1 failed run or check, 2 bad usage or config, 3 doctor found a failure, 130 interrupted with a
checkpoint written.
"""

import json
import os
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence

from conf.keys import ConfigError
from rl.cli.command import RUN_HELP, Command, CommandTable, reader_arguments, run_arguments, run_words
from rl.cli.dash_command import DASH
from rl.cli.environments.env_commands import ENV_COMMANDS
from rl.cli.reader_commands import READER_COMMANDS
from rl.cli.serve_command import SERVE
from rl.cli.shell_completion import SCRIPTS
from rl.runs.usage import UsageError

INTRODUCTION = """\
shoal trains hybrid language models with reinforcement learning in tool-using environments, asynchronously.

usage: shoal COMMAND ...      shoal COMMAND --help tells more and shows examples

{commands}

First steps:
  shoal doctor                          is this machine ready? what to do where it is not
  shoal train env=calculator            train, evaluate on held-out tasks, leave a folder in runs/
  shoal show latest                     what came of it
  shoal show latest --traj 1            one episode, word by word
  shoal train dry_run=true              print every setting with its value, start nothing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code and never shows a traceback for what a user typed."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # environments and losses beside the user, as with `python -m`
    return _guarded(list(sys.argv[1:] if argv is None else argv))


def _guarded(words: Sequence[str]) -> int:
    try:
        return run_words("shoal", SHOAL, words)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("shoal: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort of every command: told in words where the user can mend it
        code = _told(error)
        if code is None:
            traceback.print_exc()
            return 1
        from rl.monitor.progress import visible

        print(f"shoal: {visible(' '.join(str(error).split()))}", file=sys.stderr)  # it may quote an environment
        return code


def _told(error: Exception) -> int | None:
    """Exit code of an error whose message was written for the user; None for a bug, which shows its traceback."""
    from envs.errors import MalformedEnvironment, UnknownEnvironment

    if isinstance(error, ConfigError | UsageError | UnknownEnvironment | MalformedEnvironment):
        return 2
    ours = type(error).__module__.split(".")[0] in ("rl", "rollout", "envs", "policy", "conf")
    return 1 if ours or isinstance(error, OSError) else None


# --- subcommands ----------------------------------------------------------------------------------------------------


def _config_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the defaults")
    parser.add_argument("--config-dir", "-cd", action="append", default=[], metavar="DIR", help="your own YAML groups")


def _train_arguments(parser: ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of listed values")
    parser.add_argument("--sweep", metavar="JSON", help=SUPPRESS)  # what --multirun tells each of its runs


def _train(args: Namespace) -> int:
    from conf.loading import expand_sweep, load_config, resolved_yaml
    from rl.loop.preflight import check_parts

    combinations = expand_sweep(args.overrides) if args.multirun else [args.overrides]
    configs = [load_config(words, search_paths=args.config_dir, ignored=("sft.",)) for words in combinations]
    for config in configs:
        check_parts(config)
    if args.multirun:
        from rl.cli.sweep import run_sweep

        return run_sweep(combinations, configs, config_dirs=args.config_dir)
    if configs[0].dry_run:
        print(resolved_yaml(configs[0]), end="")
        return 0
    from rl.training import train

    return train(configs[0], sweep=json.loads(args.sweep) if args.sweep else None)


def _sft(args: Namespace) -> int:
    from conf.loading import load_config
    from rl.loop.preflight import check_parts

    config = load_config(args.overrides, search_paths=args.config_dir, ignored=("steps=", "rollout", "cluster"))
    check_parts(config, trains=False)
    from rl import sft

    return sft.main(config)


def _eval_arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run to change")
    parser.add_argument("--checkpoint", default="", metavar="N|all", help="of learner step N, or each; default: newest")
    parser.add_argument("--against", default="", metavar="N", help="compare it, task by task, with that of step N")


def _eval(args: Namespace) -> int:
    from rl.cli.eval_command import evaluate_run
    from rl.runs.run_folder import RunFolder
    from rl.runs.usage import resolve_run

    return evaluate_run(
        RunFolder(path=resolve_run(args.root, args.run).path.absolute()),
        overrides=args.overrides,
        checkpoint=args.checkpoint,
        against=args.against,
        as_json=args.json,
    )


def _resume_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run to change")
    parser.add_argument("--root", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")


def _resume(args: Namespace) -> int:
    from rl.runs.usage import resolve_run

    folder = resolve_run(args.root, args.run)
    from rl.training import resume

    return resume(str(folder.path.absolute()), args.overrides, root=args.root)


def _ls_arguments(parser: ArgumentParser) -> None:
    reader_arguments(parser)
    parser.add_argument("--tag", action="append", default=[], metavar="NAME", help="runs that have it (shoal note)")
    parser.add_argument("--text", default="", metavar="WORDS", help="runs with these words in their name or note")


def _ls(args: Namespace) -> int:
    from rl.cli.readers.show import list_runs

    return list_runs(args.root, tags=args.tag, text=args.text, as_json=args.json)


def _show_arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--traj", metavar="N", help="one episode: its row number, or its id")


def _show(args: Namespace) -> int:
    from rl.cli.readers.show import show_run, show_trajectory

    if args.traj is None:
        return show_run(args.run, root=args.root, as_json=args.json)
    return show_trajectory(args.run, args.traj, root=args.root, as_json=args.json)


def _bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="leave out to list them")
    parser.add_argument("rest", nargs="...", help="arguments of the benchmark, e.g. --json")


def _bench(args: Namespace) -> int:
    from rl.cli.bench import run_benchmark

    return run_benchmark(args.name, args.rest)


def _completion_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help="print its script; `words` is what scripts call")
    parser.add_argument("line", nargs="?", help="with `words`: the command line so far")


def _completion(args: Namespace) -> int:
    if args.shell != "words":
        print(SCRIPTS[args.shell], end="")
        return 0
    if args.line is None:
        raise UsageError("shoal completion words needs the command line so far, as one argument")
    from rl.cli.shell_completion import candidates

    print("\n".join(candidates(args.line, SHOAL)))
    return 0


COMMANDS: dict[str, Command | CommandTable] = {
    "train": Command(
        summary="train a policy and evaluate it before, during and after",
        examples="  shoal train env=calculator seed=2\n"
        "  shoal train env=tool_gate policy=tiny_moe learner=gspo rollout.max_staleness=1\n"
        "  shoal train env=my_envs:Chess-v0 env.level=2        an environment of yours, importable from here\n"
        "  shoal train rollout=sync cluster=inprocess          synchronous, in one process: breakpoints work\n"
        "  shoal train experiment=smoke                        every part once, in seconds\n"
        "  shoal train -m seed=1,2,3                           three runs, one after the other\n"
        "  shoal train dry_run=true                            print the settings, start nothing",
        arguments=_train_arguments,
        run=_train,
    ),
    "resume": Command(
        summary="continue an interrupted run from its last checkpoint",
        examples="  shoal resume latest\n  shoal resume 20261123-1502-calc steps=200",
        arguments=_resume_arguments,
        run=_resume,
    ),
    "eval": Command(
        summary="evaluate a run's checkpoints on held-out tasks",
        examples="  shoal eval latest --json\n  shoal eval latest evaluation.final_tasks=2000\n"
        "  shoal eval latest --checkpoint all\n  shoal eval latest --checkpoint 100 --against 50",
        arguments=_eval_arguments,
        run=_eval,
    ),
    "sft": Command(
        summary="make warm-start weights from an environment's demonstrations",
        examples="  shoal sft env=calculator sft.steps=420 sft.output=warm.safetensors",
        arguments=_config_arguments,
        run=_sft,
    ),
    "ls": Command(
        summary="list runs and their sweeps",
        examples="  shoal ls\n  shoal ls --tag baseline --text diverged\n  shoal ls --json",
        arguments=_ls_arguments,
        run=_ls,
    ),
    "show": Command(
        summary="what a run did, or one of its episodes",
        examples="  shoal show latest\n  shoal show latest --traj 1\n  shoal show latest --traj train/calculator/17/3",
        arguments=_show_arguments,
        run=_show,
    ),
    **READER_COMMANDS,
    "completion": Command(
        summary="a script that completes shoal's words in bash, zsh or fish",
        examples="  source <(shoal completion bash)               for this shell\n"
        "  shoal completion bash > ~/.local/share/bash-completion/completions/shoal\n"
        "  shoal completion zsh > ~/.zfunc/_shoal        a folder of $fpath\n"
        "  shoal completion fish > ~/.config/fish/completions/shoal.fish",
        arguments=_completion_arguments,
        run=_completion,
    ),
    "dash": DASH,
    "serve": SERVE,
    "env": ENV_COMMANDS,
    "bench": Command(
        summary="run a benchmark of the checkout",
        examples="  shoal bench\n  shoal bench async --json",
        arguments=_bench_arguments,
        run=_bench,
        takes_rest=True,
    ),
}
SHOAL = CommandTable(summary="the command", introduction=INTRODUCTION, commands=COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
