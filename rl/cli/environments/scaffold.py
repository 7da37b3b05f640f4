"""`shoal env new`: a working environment of one's own, with its test and a package around it."""

import keyword
import re
import sys
from pathlib import Path
from string import Template

from rl.runs.usage import UsageError

ENVIRONMENT = Template('''\
"""$class_name-v0: say how many of an item a store has, by asking for it."""

from envs.base import AgentEnv, call, say
from envs.tool import tool

ITEMS = ("pen", "cup", "hat", "map", "bag", "box", "jar", "pan")


class $class_name(AgentEnv):
    """Answer a question about a hidden stock. Levels: numbers of 2 to 11 digits."""

    inline = True  # all code here takes microseconds and never blocks
    max_turns = 4

    def task(self, rng, level):  # chance comes from rng alone: (seed, level) fix the problem
        self.stock = {item: rng.randint(10 ** (level + 1), 10 ** (level + 2) - 1) for item in ITEMS}
        self.item = rng.choice(ITEMS)
        return f"how many {self.item}?"

    @tool
    def count(self, item: str) -> int:
        """How many of an item there are."""
        return self.stock[item]

    def reward(self, answer):  # a number, or named parts such as {"answer": 1.0, "style": -0.1}
        return float(answer.strip() == str(self.stock[self.item]))

    def hidden_state(self):  # what of the problem the prompt does not show
        return repr(self.stock)

    def oracle(self):  # solves the problem: yields messages, receives the replies
        replies = yield call("count", item=self.item)
        yield say(replies[0].text)

    def noisy_oracle(self, rng):  # right format, some wrong decisions: what a warm start learns from
        item = self.item if rng.random() < 0.5 else rng.choice(ITEMS)
        replies = yield call("count", item=item)
        yield say(replies[0].text)
''')

TEST = Template("""\
def test_${name}_keeps_its_promises(shoal_env_check):
    shoal_env_check("$name:$class_name", levels=(0, 5, 9), seeds=10)
""")

PYPROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
dependencies = ["shoal"]

# once installed, `shoal train env=$class_name-v0` finds it without naming the module
[project.entry-points."shoal.envs"]
"$class_name-v0" = "$name:$class_name"

[tool.hatch.build.targets.wheel]
only-include = ["$name.py"]

[tool.pytest.ini_options]
pythonpath = ["."]
""")

NEXT = """\
wrote {folder}/

  cd {folder}
  shoal env check {id}                  does it keep its promises?
  shoal env play {id}                   play it yourself
  python -m pytest                        the same check as a test (pip install pytest)
  shoal sft env={id} policy.init=shop_db sft.steps=30 sft.output=warm.safetensors
  shoal train env={id} policy.init=warm.safetensors steps=10
"""


def class_name_of(name: str) -> str:
    """Example: "my_shop" -> "MyShop"."""
    return "".join(word.capitalize() for word in name.split("_"))


def write_scaffold(name: str, *, parent: Path) -> Path:
    """Write the folder `parent`/`name` and return it.

    Raises UsageError for a name that cannot be a module, or where something of that name stands already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise UsageError(
            f"{name!r} cannot be the name of a module of yours: use small letters, digits and _, as in my_shop"
        )
    folder = parent / name
    if folder.exists():
        raise UsageError(f"{folder} exists already")
    words = {"name": name, "class_name": class_name_of(name), "package": name.replace("_", "-")}
    folder.mkdir(parents=True)
    for file, template in ((f"{name}.py", ENVIRONMENT), (f"test_{name}.py", TEST), ("pyproject.toml", PYPROJECT)):
        (folder / file).write_text(template.substitute(words))
    return folder


def main(name: str, *, parent: Path) -> int:
    """Write a scaffold and say what comes next."""
    folder = write_scaffold(name, parent=parent)
    print(NEXT.format(folder=folder, id=f"{name}:{class_name_of(name)}"), end="")
    return 0
