"""ShellBox-v0: jobs like "rename kem to lup" or "what is in kem", done with the commands of a small shell.

The file system lives in memory; paths are relative to the working directory, which starts at the root. A job that
changes files is judged by a digest of the whole tree at the end; a question by the answer, and the tree must then be
left alone except for the other jobs.

Levels: 0 one job on files side by side (rename, copy, delete, make a folder, read), 1 folders, 2 files named by what is
in them; more files and deeper folders with every level; two jobs from 3, three from 6, four at 9; from 4 jobs that need
a file read first ("delete the file that kem names"), from 7 whole folders sorted by what each file says. Level 0 has
more than 10 million problems. Levels 3 to 6 need engine.max_model_tokens=640, levels 7 to 9 need 2048.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from posixpath import dirname, join
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.parts.file_tree import Tree
from envs.library.shop_db import draw_name
from envs.message import Message
from envs.task import Problem
from envs.tool import tool

CONFUSED = {"mv": "cp", "cp": "mv", "rm": "cat", "cat": "rm", "mkdir": "ls"}
PARAMETERS = {
    "cat": ("path",),
    "grep": ("word", "path"),
    "ls": ("path",),
    "mkdir": ("path",),
    "rm": ("path",),
    "cp": ("old", "new"),
    "mv": ("old", "new"),
    "write": ("path", "text"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A wish in words and how to fulfil it. Example: Job(text="delete kem", commands=(("rm", "kem"),))."""

    text: str
    commands: tuple[tuple[str, ...], ...]
    """Tool names with arguments, of which the last one matters most."""
    answer: str = ""
    """What to say; empty = this job is no question."""


class ShellBox(AgentEnv):
    """Do jobs in a file system. Reward 1 iff the tree is as it should be and a question has its exact answer."""

    inline: ClassVar[bool] = True
    max_turns = 40
    max_result_chars = 500
    tree: Tree

    def task(self, rng: random.Random, level: int) -> Problem:
        names = draw_names(rng)
        self.tree = draw_tree(rng, level, names)
        ends, homes = copy.deepcopy(self.tree), homes_of(self.tree)
        self.jobs: list[Job] = []
        num_jobs = 1 + level // 3
        while len(self.jobs) < num_jobs:
            kind = rng.choice(kinds_of_level(level, is_last=len(self.jobs) == num_jobs - 1))
            self.jobs.append(draw_job(rng, kind, self.tree, ends, homes, names))
            for name, *arguments in self.jobs[-1].commands:
                getattr(ends, name)(*arguments)
        self.gold_digest = ends.digest()
        self.opening_tree = repr((sorted(self.tree.files.items()), sorted(self.tree.folders)))
        return Problem(prompt="; ".join(job.text for job in self.jobs), meta={"needs_tool": True})

    @tool(inline=True)
    def ls(self, path: str = ".") -> str:
        """Names in a folder; folders end in /."""
        return " ".join(self.tree.ls(path)) or "empty"

    @tool(inline=True)
    def cd(self, path: str) -> str:
        """Change the working directory, where paths start."""
        self.tree.cwd = self.tree.folder(path)
        return "ok"

    @tool(inline=True)
    def cat(self, path: str) -> str:
        """Text of a file."""
        return self.tree.cat(path) or "empty"

    @tool(inline=True)
    def grep(self, word: str, path: str = ".") -> str:
        """Files in a folder and all below it whose text has the word."""
        return " ".join(self.tree.grep(word, path)) or "none"

    @tool(inline=True)
    def mv(self, old: str, new: str) -> str:
        """Move or rename a file, into `new` if that is a folder."""
        return self._change("mv", old, new)

    @tool(inline=True)
    def cp(self, old: str, new: str) -> str:
        """Copy a file, into `new` if that is a folder."""
        return self._change("cp", old, new)

    @tool(inline=True)
    def rm(self, path: str) -> str:
        """Delete a file or an empty folder."""
        return self._change("rm", path)

    @tool(inline=True)
    def mkdir(self, path: str) -> str:
        """Make a folder."""
        return self._change("mkdir", path)

    @tool(inline=True)
    def write(self, path: str, text: str) -> str:
        """Make a file with this text, or replace the text of one."""
        return self._change("write", path, text)

    def _change(self, name: str, *arguments: str) -> str:
        getattr(self.tree, name)(*arguments)
        return "ok"

    def reward(self, answer: str) -> dict[str, float]:
        right = self.tree.digest() == self.gold_digest
        if wanted := self.jobs[-1].answer:
            return {"state": 0.0, "answer": float(right and answer.strip() == wanted)}
        return {"state": float(right), "answer": 0.0}

    def hidden_state(self) -> str:
        return self.opening_tree

    def oracle(self) -> Oracle:
        for job in self.jobs:
            for command in job.commands:
                yield as_call(command)
        yield say(self.jobs[-1].answer or "done")

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, 30% a similar command, 15% a wrong name, 15% arguments swapped or no command at all."""
        slip = rng.choices(["", "command", "name", "order"], [40, 30, 15, 15])[0]
        return self.oracle() if not slip else self.slip(rng, slip)

    def slip(self, rng: random.Random, slip: str) -> Oracle:
        """As the oracle, with one kind of mistake in every command that has a similar one."""
        last = ""
        for name, *arguments in (command for job in self.jobs for command in job.commands):
            if slip == "command":
                name = CONFUSED.get(name, name)
            elif slip == "name":
                arguments[0] = "/".join([*arguments[0].split("/")[:-1], draw_name(rng)])
            elif len(arguments) > 1:
                arguments.reverse()
            else:
                continue
            replies = yield as_call((name, *arguments))
            last = replies[0].text
        question = self.jobs[-1].answer
        yield say((last or str(rng.randint(100, 999))) if question else "done")


def as_call(command: tuple[str, ...]) -> Message:
    name, *arguments = command
    return call(name, **dict(zip(PARAMETERS[name], arguments, strict=True)))


def draw_names(rng: random.Random) -> Iterator[str]:
    """Names without end, none of them twice, none that is a command."""
    seen = {"cat"}
    while True:
        if (name := draw_name(rng)) not in seen:
            seen.add(name)
            yield name


def draw_tree(rng: random.Random, level: int, names: Iterator[str]) -> Tree:
    """Files that hold a number each; folders at levels above 0, nested at levels above 2."""
    tree = Tree()
    for _ in range(0 if level == 0 else 2 + level // 2):
        parents = [path for path in sorted(tree.folders) if path.rstrip("/").count("/") <= level // 3]
        tree.folders.add(join(rng.choice(parents), next(names)))
    homes = homes_of(tree)
    for index in range(3 + 2 * level):
        home = homes[index % len(homes)]
        tree.files[join(home, next(names))] = str(rng.randint(100, 999))
    return tree


def homes_of(tree: Tree) -> list[str]:
    """Folders for files: the root only where there is no other."""
    return sorted(tree.folders - {"/"}) or ["/"]


def kinds_of_level(level: int, *, is_last: bool) -> list[str]:
    """Kinds of jobs that may be drawn; harder ones push the plain ones out. A question can only come last."""
    kinds = ["rename", "copy"] + ["delete", "folder"] * (level < 7) + ["read"] * (is_last and level < 4)
    kinds += ["move"] * (level >= 1) + ["delete_with"] * (level >= 2) + ["which"] * (is_last and level >= 2)
    return kinds + ["delete_named", "join"] * (level >= 4) + ["sort", "sort"] * (level >= 7)


def draw_job(rng: random.Random, kind: str, start: Tree, ends: Tree, homes: list[str], names: Iterator[str]) -> Job:
    """A job that can be done in `ends`, which is what the jobs before make of `start`.

    What it needs is put into both trees, and only into `homes`: a folder that an earlier job sorts must stay as it is.
    """
    old, home, here = rng.choice(sorted(ends.files)), rng.choice(homes), rng.choice(homes)
    new, source, text = join(home, next(names))[1:], old[1:], ends.files[old]
    match kind:
        case "rename":
            return Job(text=f"rename {source} to {new}", commands=(("mv", source, new),))
        case "copy":
            return Job(text=f"copy {source} to {new}", commands=(("cp", source, new),))
        case "delete":
            return Job(text=f"delete {source}", commands=(("rm", source),))
        case "folder":
            return Job(text=f"make folder {new}", commands=(("mkdir", new),))
        case "read":
            return Job(text=f"what is in {source}", commands=(("cat", source),), answer=text)
        case "move":
            other = rng.choice([path for path in sorted(ends.folders) if path not in ("/", dirname(old))])
            return Job(text=f"move {source} into {other[1:]}", commands=(("mv", source, other[1:]),))
        case "delete_with" | "which":
            number = add_file(rng, start, ends, join(here, next(names)))
            (path,) = ends.grep(number, ".")
            if kind == "which":
                return Job(text=f"which file has {number}", commands=(("grep", number, "."),), answer=path)
            return Job(text=f"delete the file with {number}", commands=(("grep", number, "."), ("rm", path)))
        case "delete_named":
            start.files[join("/", new)] = ends.files[join("/", new)] = source
            return Job(text=f"delete the file that {new} names", commands=(("cat", new), ("rm", source)))
        case "join":
            other = rng.choice(sorted(ends.files))
            commands = (("cat", source), ("cat", other[1:]), ("write", new, text + ends.files[other]))
            return Job(text=f"join {source} and {other[1:]} in {new}", commands=commands)
    commands = [("ls", new)]
    start.folders.add(join("/", new))
    ends.folders.add(join("/", new))
    for _ in range(3):
        goal, path = rng.choice(homes)[1:], join(new, next(names))
        start.files[join("/", path)] = ends.files[join("/", path)] = goal
        commands += [("cat", path), ("mv", path, goal)]
    return Job(text=f"put each file of {new} into the folder it names", commands=tuple(commands))


def add_file(rng: random.Random, start: Tree, ends: Tree, path: str) -> str:
    """Add a file to both trees; its number, which no other file has, comes back."""
    while start.grep(number := str(rng.randint(100, 999)), "/") or ends.grep(number, "/"):
        pass
    start.files[path] = ends.files[path] = number
    return number
