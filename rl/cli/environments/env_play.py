"""`shoal env play`: a person plays an environment in the terminal."""

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envs.base import AgentEnv, Observation, call, say
from envs.check.demonstration import demonstrate
from envs.message import ImagePart, Message, ToolSpec
from envs.registry import make_env
from envs.worker_thread import run_sync
from rl.monitor.progress import visible
from rl.runs.transcript import message_text
from rl.runs.usage import UsageError

HELP = """\
  TOOL ARG=VALUE ...   call a tool; quote what holds spaces: sql query="select 1". Values alone are taken in order.
  anything else        your answer, or your next words to a scripted user
  :say TEXT            the answer TEXT, though it begins like a call
  :tools               what can be called
  :oracle              what the oracle says at this point of its own episode
  :help  :quit"""


@dataclass(kw_only=True, slots=True)
class Game:
    """One episode in a terminal."""

    env: AgentEnv
    env_id: str
    kwargs: Mapping[str, Any]
    """What the constructor was given."""
    seed: int
    level: int
    tools: tuple[ToolSpec, ...] = ()
    num_turns: int = 0
    images: Path | None = None
    """Where images were saved; None before the first one."""
    planned: list[str] = field(default_factory=list)
    """What the oracle says in its own episode, turn by turn; made when first asked for."""

    def start(self) -> Observation:
        opening, info = self.env.reset(seed=self.seed, options={"level": self.level})
        self.tools = info["tools"]
        return opening

    def show(self, messages: Iterable[Message]) -> None:
        for message in messages:
            print(visible(message_text(message)))
            for part in message.content:
                if isinstance(part, ImagePart):
                    print(f"           image: {self._save(part)}")

    def action(self, line: str) -> Message:
        """What a typed line means. Raises `UsageError` for a call with an argument that the tool does not have."""
        word, _, rest = line.partition(" ")
        if word == ":say":
            return say(rest)
        spec = next((spec for spec in self.tools if spec.name == word), None)
        return say(line) if spec is None else call(word, **_arguments(spec, rest))

    def hint(self) -> str:
        if not self.planned:
            twin = make_env(self.env_id, **self.kwargs)
            try:
                messages = demonstrate(twin, self.seed, self.level).messages
            finally:
                close(twin)
            self.planned = [message_text(message) for message in messages if message.role == "assistant"]
        if self.num_turns >= len(self.planned):
            return f"the oracle was done after {len(self.planned)} messages"
        return self.planned[self.num_turns]

    def _save(self, image: ImagePart) -> Path:
        if self.images is None:
            self.images = Path(tempfile.mkdtemp(prefix="shoal-play-"))
        suffix = image.media_type.rpartition("/")[2].split("+")[0] or "bin"
        path = self.images / f"{len(list(self.images.iterdir())) + 1}.{suffix}"
        path.write_bytes(image.data)
        return path


def tool_lines(tools: Iterable[ToolSpec]) -> list[str]:
    """Example: "add a:integer b:integer=0   Add two integers." """
    lines = []
    for spec in tools:
        parameters = [
            f"{name}:{schema.get('type', 'value')}" + (f"={schema['default']}" if "default" in schema else "")
            for name, schema in spec.parameters.get("properties", {}).items()
        ]
        lines.append(f"  {' '.join([spec.name, *parameters])}   {spec.description}")
    return lines


def _arguments(spec: ToolSpec, text: str) -> dict[str, Any]:
    names = list(spec.parameters.get("properties", {}))
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{error}: put text with quotes or spaces into quotes") from None
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in names:
            arguments[name] = value
            continue
        free = [name for name in names if name not in arguments]
        if not free:
            raise UsageError(f"{spec.name} takes {', '.join(names) or 'no arguments'}; {word!r} is left over")
        arguments[free[0]] = word
    return arguments


def play(env_id: str, *, kwargs: Mapping[str, Any], seed: int, level: int) -> int:
    """Play one episode by lines of standard input, to its end, ":quit" or the end of the input."""
    env = make_env(env_id, **kwargs)
    if not 0 <= level < env.levels:
        raise UsageError(f"level {level} of {env_id} is not in 0..{env.levels - 1}")
    game = Game(env=env, env_id=env_id, kwargs=kwargs, seed=seed, level=level)
    try:
        print(f"{env_id}, seed {seed}, level {level}; at most {env.max_turns} messages; :help tells how to play")
        game.show(game.start())
        print(visible("\n".join(["tools:", *tool_lines(game.tools)] if game.tools else ["no tools"])))
        while (line := _next_line()) is not None:
            if _played(game, line):
                return 0
        print("left before the end")
        return 0
    finally:
        close(env)


def close(env: AgentEnv) -> None:
    """Close an environment on the thread where its code ran: sqlite insists on it."""
    run_sync(env.run_author(env.close), env.reset_timeout_s)


def _next_line() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line in (":quit", ":q") else line


def _played(game: Game, line: str) -> bool:
    """Do what a line says; returns whether the episode is over."""
    if line == ":help":
        print(HELP)
    elif line == ":tools":
        print(visible("\n".join(tool_lines(game.tools)) or "no tools"))
    elif line == ":oracle":
        print(visible(game.hint()))
    elif line.startswith(":") and not line.startswith(":say"):
        print(f"unknown command {line.split()[0]!r}; :help tells which there are")
    else:
        try:
            action = game.action(line)
        except UsageError as error:
            print(visible(str(error)))
            return False
        replies, reward, terminated, truncated, info = game.env.step(action)
        game.num_turns += 1
        game.show(replies)
        if terminated or truncated:
            parts = ", ".join(f"{name} {value:g}" for name, value in info["reward_parts"].items())
            why = "the turn limit ended it; " if truncated else ""
            print(visible(f"   ended: {why}reward {reward:g} ({parts})"))
            return True
    return False
