"""`shoal serve`: an endpoint that speaks OpenAI's chat format, over a run's newest checkpoint.

Nothing is trained. What is sampled is recorded in a run folder of its own: one trajectory for each token row, all
rows of a session in one group, with the reward that ended it.
"""

import asyncio
import secrets
from argparse import ArgumentParser, Namespace

from rl.cli.command import Command, run_arguments
from rl.runs.usage import UsageError

PORT = 8766


def _arguments(parser: ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run to change")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="another than loopback needs the key")
    parser.add_argument("--name", action="append", default=[], metavar="NAME", help="a host name that clients may use")
    parser.add_argument("--key", default="", metavar="TEXT", help="API key; default: any on loopback, else a new one")
    parser.add_argument(
        "--session-deadline", type=float, default=600.0, metavar="S", help="seconds a session may last (default: 600)"
    )


def _serve(args: Namespace) -> int:
    from conf.loading import read_config, resolved_yaml
    from rl.runs.run_folder import RunFolder
    from rl.runs.usage import resolve_run

    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is 0 to 65535; got {args.port}")
    if not 0 < args.session_deadline <= 86400:
        raise UsageError(f"--session-deadline is more than 0 and at most 86400 seconds; got {args.session_deadline:g}")
    run = resolve_run(args.root, args.run)
    config = read_config(run.config.read_text(), args.overrides)
    loopback = args.host in ("localhost", "127.0.0.1", "::1")
    key = args.key or ("" if loopback else secrets.token_urlsafe(24))
    names = tuple(name.lower() for name in (*args.name, args.host) if name not in ("0.0.0.0", "::"))

    def fill(folder: RunFolder) -> None:
        folder.write_config(resolved_yaml(config))

    from rl.serving import serve
    from rollout.serve.agent_desk import AgentDesk

    folder = RunFolder.create(args.root, "serve", config.env.name, fill=fill)
    desk = AgentDesk(hosts=names, tokens={key: "client"} if key else {})
    try:
        asyncio.run(serve(config, run, folder, args, desk))
    except BaseException as error:  # interrupted too: the folder says how it ended
        folder.finish("failed", error=f"{type(error).__name__}: {error}")
        raise
    folder.finish("finished")
    return 0


SERVE = Command(
    summary="serve a run's policy to agents of your own (OpenAI's chat format) and record what they do",
    examples="  shoal serve latest\n  shoal serve latest --port 0 --session-deadline 60\n"
    "  OPENAI_BASE_URL=http://127.0.0.1:8766/v1 OPENAI_API_KEY=any python my_agent.py\n"
    "  shoal show latest --traj 1                 what was recorded: serving makes a run folder of its own\n"
    '  shoal train env=calculator agent.command="python my_agent.py"      trains with that agent (docs/serve.md)',
    arguments=_arguments,
    run=_serve,
)
