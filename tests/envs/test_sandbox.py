"""The sandbox as its users see it: results, limits, files, failures of its own processes, what it refuses to be."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from envs.base import AgentEnv, call
from envs.outcome import StepOutcome
from envs.pool.pool import EnvPool
from envs.sandbox import confinement
from envs.sandbox.limits import Execution, Limits, SandboxFault, SandboxUnavailable
from envs.sandbox.sandbox import (
    Sandbox,
    kinds_of,
    open_sandbox,
    run_code,
    same_data,
)
from envs.sandbox.zygotes import Zygote, ZygotePool, launcher_of
from envs.task import Task
from envs.tool import tool
from envs.worker_thread import run_sync

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(bool(confinement.missing_features()), reason="this kernel cannot confine"),
    pytest.mark.slow,
    pytest.mark.sandbox,
]


@pytest.fixture(scope="module")
def jail() -> Iterator[Sandbox]:
    sandbox = open_sandbox("jail")
    yield sandbox
    sandbox.close()


def run(sandbox: Sandbox, source: str, **options: object) -> Execution:
    return run_sync(sandbox.run(source, **options), 60)  # type: ignore[arg-type]  # options of run


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_the_last_expression_is_the_value(jail: Sandbox) -> None:
    done = run(jail, "print('hi')\nx = 3\n{'a': [x, 1.5, None, True, 'é']}")
    assert (done.exit, done.stdout, done.value) == ("ok", "hi\n", {"a": [3, 1.5, None, True, "é"]})
    assert run(jail, "x = 3").value is None
    shown_only = run(jail, "{1, 2}")
    assert (shown_only.value, shown_only.shown, shown_only.text) == (None, "{1, 2}", "{1, 2}")
    assert run(jail, "lambda x: x").text == "<function <lambda>>"


@pytest.mark.parametrize(
    ("source", "exit_kind"),
    [
        ("1/0", "error"),
        ("def f(:", "error"),
        ("import sys; sys.exit(3)", "error"),
        ("import sys; sys.exit(0)", "ok"),
        ("import os; os._exit(0)", "ok"),
        ("x = bytearray(10 ** 9)", "memory"),
        ("while True: pass", "cpu"),
        ("import time; time.sleep(9)", "timeout"),
        ("while True: print('x' * 1000)", "output"),
        ("import os\nwhile True: os.write(3, b'x' * 1000)", "output"),
        ("import os\nfor i in range(500): open(str(i), 'wb').write(b'x' * 100_000)", "disk"),
        ("open('a', 'wb').write(b'x' * (9 << 20))", "error"),
        ("import ctypes; ctypes.string_at(0)", "signal"),
        ("def f(): f()\nf()", "error"),
        ("f'{10 ** 5000}'", "error"),
        ("10 ** 5000", "error"),
        ("\ud800", "error"),
        ("\0", "error"),
        ("(" * 5000, "error"),
        ("class A:\n    def __repr__(self): 1/0\nA()", "error"),
    ],
)
def test_how_a_run_ends_is_told(jail: Sandbox, source: str, exit_kind: str) -> None:
    done = run(jail, source, limits=Limits(wall_s=2.5))
    assert (done.exit, done.value) == (exit_kind, None), done
    assert done.seconds < 5
    assert len(done.stdout) <= Limits().output_bytes
    assert "jail_child" not in done.stderr


def test_the_jail_stands_after_each_of_them(jail: Sandbox) -> None:
    assert run(jail, "2 + 2").value == 4


def test_a_flood_is_cut_while_it_is_read(jail: Sandbox) -> None:
    wide = Limits(output_bytes=2 << 20)
    assert len(run(jail, "print('x' * 1_000_000)", limits=wide).stdout) == 1_000_001
    started = time.monotonic()
    done = run(jail, "while True: print('x' * 100_000)")
    assert (done.exit, len(done.stdout)) == ("output", 64 << 10)
    assert time.monotonic() - started < 3


def test_files_and_input_go_in_and_files_come_out(jail: Sandbox) -> None:
    files = {"a.txt": "å", "b.bin": b"\x00\xff"}
    source = "open('c', 'w').write(open('a.txt', encoding='utf-8').read() + input())\nimport os; os.remove('a.txt')"
    done = run(jail, source, files=files, stdin="line\n", collect=True)
    assert done.exit == "ok", done
    assert done.files == {"b.bin": b"\x00\xff", "c": "åline".encode()}
    assert run(jail, "import os; os.listdir('.')").value == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/x", "x\0", "n" * 300])
def test_a_file_name_that_leads_elsewhere_is_refused(jail: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="no plain file name"):
        run(jail, "1", files={name: "x"})


def test_a_run_knows_nothing_of_the_one_before(jail: Sandbox) -> None:
    run(jail, "import math, builtins, json; math.pi = 3; builtins.len = json.dumps = None; open('left', 'w')")
    assert run(jail, "import math, os; [math.pi > 3.1, len('ab'), os.listdir('.')]").value == [True, 2, []]


def test_the_same_run_gives_the_same_text(jail: Sandbox) -> None:
    source = "import random, os; print(random.random(), {'a', 'b', 'c', 'd'}, hash('x')); [dict(os.environ), object()]"
    first = run(jail, source)
    other = run_code(source, sandbox="none")
    assert first.text == run(jail, source).text == other.text


def test_what_python_needs_still_works(jail: Sandbox) -> None:
    source = """
import base64, collections, csv, datetime, decimal, hashlib, json, sqlite3, tempfile, uuid, zlib, pathlib
db = sqlite3.connect("x.db"); db.execute("create table t(a)"); db.execute("insert into t values(1)"); db.commit()
pathlib.Path("y").write_text("1"); pathlib.Path("y").rename("z")
with open("z", "a") as f: f.write("2")
[db.execute("select * from t").fetchall(), pathlib.Path("z").read_text(), hashlib.sha256(b"").hexdigest()[:4]]
"""
    assert run(jail, source).value == [[[1]], "12", "e3b0"]


def test_descriptors_of_the_parent_are_closed(jail: Sandbox) -> None:
    source = "import os\nopened = []\nfor fd in range(256):\n    try: os.fstat(fd); opened.append(fd)\n"
    assert run(jail, source + "    except OSError: pass\nopened").value == [0, 1, 2, 3]


def test_runs_at_once_are_bounded_and_do_not_meet() -> None:
    async def all_at_once(pool: ZygotePool) -> list[Execution]:
        source = "import os, time; before = os.listdir('.'); open('f{0}', 'w'); time.sleep(0.1); [before, {0}]"
        return list(await asyncio.gather(*(pool.run(source.format(i)) for i in range(12))))

    before = children()
    pool = ZygotePool(launcher_of("jail", ""), slots=3)
    try:
        assert [done.value for done in asyncio.run(all_at_once(pool))] == [[[], i] for i in range(12)]
        assert len(children() - before) == 3
    finally:
        pool.close()


def test_a_killed_zygote_is_replaced_and_its_run_tried_again() -> None:
    pool = ZygotePool(launcher_of("jail", ""), slots=1)
    before = children()
    try:
        run(pool, "1")
        for zygote in children() - before:
            os.kill(zygote, signal.SIGKILL)
        assert (run(pool, "1 + 1").value, pool.num_faults) == (2, 1)
    finally:
        pool.close()


@pytest.mark.parametrize("failed_starts", [1, 2])
def test_a_zygote_that_does_not_start_is_tried_once_more(failed_starts: int) -> None:
    def command(settings: str, folder: Path) -> list[str]:
        starts.append(folder)
        return ["/bin/false"] if len(starts) <= failed_starts else working.command(settings, folder)

    starts: list[Path] = []
    working = launcher_of("jail", "")
    pool = ZygotePool(replace(working, command=command), slots=1)
    try:
        if failed_starts == 1:
            assert run(pool, "1 + 1").value == 2
        else:
            with pytest.raises(SandboxFault, match="ended"):
                run(pool, "1 + 1")
        assert (len(starts), pool.num_faults) == (2, failed_starts)
    finally:
        pool.close()


def test_a_zygote_that_dies_twice_is_a_fault_and_not_a_result() -> None:
    async def killed(pool: ZygotePool) -> None:
        job = asyncio.ensure_future(pool.run("import time; time.sleep(3)"))
        while not job.done():
            await asyncio.sleep(0.02)
            for child in children() - before:
                os.kill(child, signal.SIGKILL)
        await job

    before = children()
    pool = ZygotePool(launcher_of("jail", ""), slots=1)
    try:
        with pytest.raises(SandboxFault):
            asyncio.run(asyncio.wait_for(killed(pool), 30))
    finally:
        pool.close()


class RunsCode(AgentEnv):
    """A tool in a sandbox whose process ends under it."""

    def task(self, rng: random.Random, level: int) -> str:
        return "run it"

    @tool
    async def run(self, source: str) -> str:
        """Run Python."""

        class Dying(Zygote):
            def exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
                os.kill(self.pid, signal.SIGKILL)
                return super().exchange(request, timeout_s)

        zygote = Dying(launcher_of("jail", ""))
        try:
            return str(zygote.exchange({"source": source}, 10.0))
        finally:
            zygote.close()

    def reward(self, answer: str) -> float:
        return 0.0


def test_a_sandbox_that_dies_in_a_tool_is_no_result_but_a_fault_of_the_machine() -> None:
    async def episode() -> StepOutcome:
        pool = EnvPool()
        opened = await pool.open("a", Task(task_id="t", env_id=f"{__name__}:RunsCode", env_name="e", seed=1))
        assert opened.failure is None, opened.failure
        outcome = await pool.step("a", call("run", source="1"))
        await pool.close_all()
        return outcome

    outcome = asyncio.run(asyncio.wait_for(episode(), 30))
    assert outcome.messages == () and outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.where) == ("infra", "step")
    assert "sandbox's process ended" in outcome.failure.message


def test_the_last_user_closes_the_processes_and_folders() -> None:
    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("shoal-sandbox-*"))

    before, had = children(), folders()
    first, second = open_sandbox("jail,none"), open_sandbox("jail,none")
    run(first, "1")
    first.close()
    first.close()
    assert run(second, "1").value == 1
    assert children() - before
    second.close()
    assert (children() - before, folders() - had) == (set(), set())
    with pytest.raises(RuntimeError, match="closed"):
        run(second, "1")


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    program = """
import asyncio, os, sys
from envs.sandbox.sandbox import open_sandbox
async def main():
    job = asyncio.ensure_future(open_sandbox("jail").run("import time; time.sleep(50)"))
    await asyncio.sleep(1.0)
    print("ready", flush=True)
    await job
asyncio.run(main())
"""
    folder = Path(tempfile.mkdtemp())
    environment = {**os.environ, "TMPDIR": str(folder)}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2  # a zygote and its child
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    folder.rmdir()  # it is empty


def test_no_isolation_must_be_typed() -> None:
    assert kinds_of("auto") == [("jail", ""), ("bwrap", "")]
    assert kinds_of("jail, container:img:3") == [("jail", ""), ("container", "img:3")]
    for wrong in ("", "chroot", "jail,", "container", "none:x"):
        with pytest.raises(ValueError, match="sandbox"):
            kinds_of(wrong)


LACKING = """
import ctypes, struct, sys
from envs.sandbox import confinement as c
def lack(*numbers):
    code = [(0x20, 0, 0, 0)]
    for number in numbers:
        code += [(0x15, 0, 1, number), (6, 0, 0, 0x50000 | 38)]
    code = b"".join(struct.pack("=HBBI", *i) for i in [*code, (6, 0, 0, 0x7fff0000)])
    buffer = ctypes.create_string_buffer(code, len(code))
    c.forbid_new_privileges()
    assert ctypes.CDLL(None).prctl(22, 2, struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)), 0, 0) == 0
lack(*map(int, sys.argv[2].split(",")))
from envs.sandbox.sandbox import open_sandbox, SandboxUnavailable
try:
    print(open_sandbox(sys.argv[1]).kind)
except SandboxUnavailable as error:
    print(error)
"""


def on_a_kernel_without(calls: str, choice: str) -> str:
    """What open_sandbox says where these system calls do not exist: really, by a filter that its processes inherit."""
    words = [sys.executable, "-c", LACKING, choice, calls]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_missing_kernel_feature_is_named_and_the_next_kind_is_taken() -> None:
    landlock, seccomp = "444", str(confinement._SECCOMP[confinement.machine()])
    assert "jail: the kernel has no Landlock" in on_a_kernel_without(landlock, "jail")
    assert "jail: the kernel has no seccomp filters" in on_a_kernel_without(seccomp, "jail")
    both = on_a_kernel_without(f"{landlock},{seccomp}", "jail")
    assert "no Landlock" in both
    assert "no seccomp" in both
    assert "sandbox=none" in both
    assert on_a_kernel_without(landlock, "jail,none") == "none\n"


def test_bubblewrap_follows_where_the_jail_cannot_be() -> None:
    try:
        open_sandbox("bwrap").close()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert on_a_kernel_without("444", "auto") == "bwrap\n"


def test_a_container_without_an_engine_or_image_says_so() -> None:
    with pytest.raises(SandboxUnavailable, match="container: "):
        open_sandbox("container:no-such-image-anywhere:1")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1, True),
        (1, True, False),
        (1, 1.0, False),
        ([1, [2]], [1, [2]], True),
        ([1, [2]], [1, [True]], False),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (None, 0, False),
        ("1", 1, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_data_is_equal_only_with_equal_types(a: object, b: object, equal: bool) -> None:
    assert same_data(a, b) is equal


@pytest.mark.parametrize("wrong", [{"wall_s": 0.0}, {"wall_s": float("nan")}, {"cpu_s": 0}, {"memory_bytes": 0}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        Limits(**wrong)  # type: ignore[arg-type]  # one field each


def test_the_filter_allows_only_named_calls_on_both_machines() -> None:
    forbidden = {"x86_64": {41, 56, 57, 58, 59, 62, 101, 157, 165, 272, 310, 319, 322, 425, 424, 434}}
    forbidden["aarch64"] = {97, 117, 129, 130, 131, 167, 198, 199, 200, 203, 220, 221, 270, 279, 281, 424, 425, 434}
    for arch, numbers in forbidden.items():
        assert not numbers & set(confinement.allowed_calls(arch))
        assert len(confinement.filter_program(arch)) % 8 == 0
