"""The walk-through of docs/debugging-environments.md: its commands in a shell, its outputs, a judge that misbehaves."""

import doctest
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rollout.record.recorder import TrajectoryReader

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(280)]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "debugging-environments.md"
PROMPT = "(Pdb) "
KEY = 'k7"correct-horse\\battery'

SHELL = f"""
shoal() {{ {sys.executable} -m rl.cli "$@"; }}
python() {{ {sys.executable} "$@"; }}
"""
KEYLESS = '''
import os
from pathlib import Path

def first_is_best(rewards):
    """Runs in the learner's process, a child of Ray's: neither may have the key."""
    processes = ["self", os.getppid()]
    if "JUDGE_KEY" in os.environ or any(b"JUDGE_KEY" in Path(f"/proc/{p}/environ").read_bytes() for p in processes):
        raise RuntimeError("the learner or Ray has the key")
    return [1.0 if i == 0 else -1.0 / (len(rewards) - 1) for i in range(len(rewards))]
'''


class Judge(BaseHTTPRequestHandler):
    """Hangs on the very first question, refuses the first of each body, then answers and tells who asked."""

    asked: ClassVar[Counter[bytes]] = Counter()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Judge.asked[body] += 1
        if Judge.asked.total() == 1:
            time.sleep(3.0)  # longer than an attempt may take
        elif Judge.asked[body] == 1:
            self.send_error(503)
        else:
            verdict = {"score": len(json.loads(body)["product"]) % 2, "asked by": self.headers["Authorization"]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(verdict).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("localhost", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def examples() -> Iterator[tuple[str, list[str], str]]:
    """(command, lines typed into it, output that is wanted) of each "$" in the page's console blocks, in order."""
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, rest = re.sub(r"\\\n\s*", "", example).partition("\n")
            lines = rest.splitlines(keepends=True)
            typed = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
            yield command, typed, "".join(line for line in lines if not line.startswith(PROMPT))


def test_the_walk_through_shows_what_it_says_and_the_key_is_nowhere(tmp_path: Path, judge: str) -> None:
    for name, code in re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "keyless.py").write_text(KEYLESS)
    environment = {k: v for k, v in os.environ.items() if k != "JUDGE_KEY"} | {"PYTHONPATH": str(ROOT)}
    exported = ""  # of the commands before: each runs in a shell of its own
    status = 0
    check = doctest.OutputChecker().check_output
    for command, typed, want in examples():
        if command.startswith("export "):
            exported += command.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}") + "\n"
            continue
        script = command.replace("localhost:8900", judge).replace("run.name=judged", "run.name=judged " + KEYLESS_WORD)
        done = subprocess.run(
            ["bash", "-c", f"{SHELL}{exported}(exit {status})\n{script}"],
            input="".join(typed),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )
        status = done.returncode
        got = done.stdout.replace(PROMPT, "")
        assert check(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), f"$ {command}\n{got[-3000:]}"
        assert status == (2 if "no environment variable" in want else 0), f"$ {command}\n{got[-3000:]}"
    the_key_is_nowhere(tmp_path / "runs" / "judged")
    assert max(Judge.asked.values()) > 1


KEYLESS_WORD = "learner.loss.advantage=keyless:first_is_best"


def the_key_is_nowhere(folder: Path) -> None:
    """In no file as bytes, and in no trajectory as it is read back; the mark is where the key would be."""
    spellings = [KEY, json.dumps(KEY)[1:-1], "correct-horse"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    for path in files:
        data = path.read_bytes()
        assert [spelling for spelling in spellings if spelling.encode() in data] == [], path
    with TrajectoryReader(folder / "trajectories.db") as reader:
        rows = [reader.get(row["row"]).trajectory for row in reader.list({}, limit=1000)]
    assert len(rows) >= 16 and all(
        "[secret JUDGE_KEY]" in row.meta["printed"] for row in rows if row.reward is not None
    )
    assert not [row for row in rows if "correct-horse" in repr(row)]
    assert [row.stop_reason for row in rows if row.reward is None] == []
