"""Commands that look at runs and at this machine and change nothing in either."""

import sys
from argparse import ArgumentParser, Namespace

from rl.cli.command import RUN_HELP, Command, reader_arguments, run_arguments
from rl.runs.usage import UsageError


def _audit(args: Namespace) -> int:
    from rl.cli.readers.audit import audit

    return audit(args.run, root=args.root, as_json=args.json)


def _diff_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("a", metavar="RUN", help=RUN_HELP)
    parser.add_argument("b", metavar="RUN", help="the other one")
    reader_arguments(parser)


def _diff(args: Namespace) -> int:
    from rl.cli.readers.diff import diff

    return diff(args.a, args.b, root=args.root, as_json=args.json)


def _report_arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="default: RUN.html, here")


def _report(args: Namespace) -> int:
    from rl.cli.readers.report_page import report

    return report(args.run, root=args.root, output=args.output, as_json=args.json)


def _plot_arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("metrics", nargs="*", metavar="METRIC", help="default: success, reward, staleness, speed, ...")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: RUN.png, here")


def _plot(args: Namespace) -> int:
    from rl.cli.readers.plot import plot

    return plot(args.run, args.metrics, root=args.root, output=args.output, as_json=args.json)


def _export_arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("parts", nargs="*", metavar="PART", help="trajectories, metrics, weights; tensorboard if named")
    parser.add_argument("-o", "--output", metavar="DIR", help="default: RUN-export, here")
    parser.add_argument("--status", choices=["committed", "consumed", "dropped", "eval"], help="trajectories that are")
    parser.add_argument("--env", metavar="NAME", help="trajectories of an environment")
    parser.add_argument("--step", type=int, metavar="N", help="trajectories that learner step N took")
    parser.add_argument("--tokens", action="store_true", help="with token ids, mask, both logprobs, policy versions")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="weights of step N (default: the newest)")


def _export(args: Namespace) -> int:
    from rl.cli.readers.export import export

    asked = {"status": args.status, "env_name": args.env, "step": args.step}
    return export(
        args.run,
        args.parts,
        root=args.root,
        output=args.output,
        filters={name: value for name, value in asked.items() if value is not None},
        tokens=args.tokens,
        checkpoint=args.checkpoint,
        as_json=args.json,
    )


def _note_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("text", metavar="TEXT", nargs="?", help="becomes the run's note; '' removes it")
    parser.add_argument("--tag", action="append", default=[], metavar="NAME", help="add a tag")
    parser.add_argument("--untag", action="append", default=[], metavar="NAME", help="remove a tag")
    reader_arguments(parser)


def _note(args: Namespace) -> int:
    from rl.cli.note_command import annotate

    return annotate(args.run, args.text, tag=args.tag, untag=args.untag, root=args.root, as_json=args.json)


def _top_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help=f"{RUN_HELP} (default: latest)")
    reader_arguments(parser)


def _top(args: Namespace) -> int:
    from rl.cli.readers.run_watch import RunWatch, print_glance

    watch = RunWatch.open(args.root, args.run)
    if args.json or not sys.stdout.isatty():
        return print_glance(watch, as_json=args.json)
    from rl.cli.readers.top import run_app

    return run_app(watch)


def _doctor_arguments(parser: ArgumentParser) -> None:
    reader_arguments(parser)
    parser.add_argument("--no-smoke", action="store_true", help="leave out the training of three steps (10 s)")
    parser.add_argument(
        "--engine", choices=["local", "vllm"], help="how far its logprobs are from the learner's; nothing else"
    )
    parser.add_argument("--policy", default="tiny_hybrid", metavar="NAME", help="of that comparison, as in policy=NAME")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of that comparison, e.g. env=shop_db")


def _doctor(args: Namespace) -> int:
    if args.engine:
        from rl.cli.doctor.consistency import main

        return main(args.engine, args.policy, args.overrides, as_json=args.json)
    if args.overrides:
        raise UsageError(f"{args.overrides[0]!r}: settings are for the comparison of --engine alone")
    from rl.cli.doctor.doctor import doctor

    return doctor(args.root, smoke=not args.no_smoke, as_json=args.json)


READER_COMMANDS: dict[str, Command] = {
    "top": Command(
        summary="watch a run in the terminal, also over ssh",
        examples="  shoal top                   the newest run; q leaves, the run goes on\n"
        "  shoal top latest --json     one glance, for scripts",
        arguments=_top_arguments,
        run=_top,
    ),
    "report": Command(
        summary="a run as one HTML file to send to somebody",
        examples="  shoal report latest\n  shoal report latest -o report.html",
        arguments=_report_arguments,
        run=_report,
    ),
    "plot": Command(
        summary="a run's curves as a PNG",
        examples="  shoal plot latest\n  shoal plot latest reward/mean policy/entropy -o curves.png",
        arguments=_plot_arguments,
        run=_plot,
    ),
    "export": Command(
        summary="a run's episodes, metrics and weights as files for other programs",
        examples="  shoal export latest                          JSONL, CSV, a transformers folder, in RUN-export/\n"
        "  shoal export latest trajectories --status consumed --tokens -o trained\n"
        "  shoal export latest weights --checkpoint 40  AutoModelForCausalLM.from_pretrained('RUN-export/weights')\n"
        "  shoal export latest metrics tensorboard --json",
        arguments=_export_arguments,
        run=_export,
    ),
    "note": Command(
        summary="write a note and tags into a run's folder, or read them",
        examples='  shoal note latest "the seed that diverged"      replaces the note\n'
        "  shoal note latest --tag baseline --untag todo   the run may be live, or of another machine (by its path)\n"
        "  shoal note latest                               what stands there\n"
        "  shoal ls --tag baseline                         and the dashboard's list of runs finds them",
        arguments=_note_arguments,
        run=_note,
    ),
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
    "doctor": Command(
        summary="is this machine ready? and the command that helps where it is not",
        examples="  shoal doctor\n  shoal doctor --no-smoke --json        exit code 3: something failed\n"
        "  shoal doctor --engine vllm env=shop_db        how far its logprobs are from the learner's",
        arguments=_doctor_arguments,
        run=_doctor,
    ),
}
