"""Attacks on the sandbox, and a runner for them: `python -m tests.envs.sandbox_attacks KIND attacks|cheats`.

The value of an attack's last line is True where it succeeded. Each succeeds with sandbox=none and wide limits, or its
test says nothing. They do no harm there: what they kill, fork or overwrite is the runner's own. Any Python can start
them; the cheats, answers to a task of PyCode that ask for a reward without solving it, need Shoal's packages.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

from envs.sandbox.sandbox import Limits, open_sandbox

LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
ATTACKS = {
    "read a secret file": "open('{secret}').read() == 'secret'",
    "list the root": "import os; 'etc' in os.listdir('/')",
    "list other runs": "import os; len(os.listdir('..')) > 0",
    "read the parent's environment": "b'TOKEN=secret' in open('/proc/{pid}/environ', 'rb').read()",
    "open the parent's memory": "open('/proc/{pid}/mem', 'rb').fileno() > 0",
    "write outside": "open('{outside}/new', 'w').write('x') == 1",
    "truncate outside": "import os; os.truncate('{outside}/victim', 0) is None",
    "truncate by opening": "import os; os.open('{outside}/victim', os.O_RDONLY | os.O_TRUNC) > 0",
    "chmod outside": "import os; os.chmod('{outside}/victim', 0o777) is None",
    "set times outside": "import os; os.utime('{outside}/victim', (1, 1)) is None",
    "set attributes outside": "import os; os.setxattr('{outside}/victim', 'user.a', b'x') is None",
    "remove outside": "import os; os.remove('{outside}/spare') is None",
    "connect by TCP": "import socket; socket.create_connection(('127.0.0.1', {port}), 1).fileno() > 0",
    "listen on TCP": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); True",
    "send by UDP": "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port})) == 1",
    "connect to a unix socket": "import socket; s = socket.socket(1, 1); s.connect('{outside}/socket'); True",
    "connect to an abstract socket": "import socket; s = socket.socket(1, 1); s.connect('\\0shoal-{pid}'); True",
    "kill the parent": "import os; os.kill({pid}, 23) is None",  # SIGURG, ignored by default
    "kill the zygote": "import os; os.kill(os.getppid(), 23) is None",
    "kill everything": "import os; os.kill(-1, 0) is None",
    "signal through F_SETOWN": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {pid}) is not None",
    "choose a signal for F_SETOWN": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 23) is not None",
    "open a pidfd": "import os; os.pidfd_open({pid}) > 0",
    "trace": LIBC + "libc.ptrace(0, 0, 0, 0) == 0",
    "read another's memory": LIBC + "libc.process_vm_readv(os.getpid(), None, 0, None, 0, 0) == 0",
    "fork": "import os; pid = os.fork(); pid or os._exit(0); pid > 0",
    "fork bomb": "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(20); os._exit(0)\nTrue",
    "start a program": "import subprocess; subprocess.run(['/bin/true']).returncode == 0",
    "start a thread": "import threading; threading.Thread(target=print).start() is None",
    "leave an orphan": "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(0.2)\n"
    "    open('{outside}/orphan', 'w').close(); os._exit(0)\nTrue",
    "use 600 MB": "len(bytearray(b'x') * (600 << 20)) > 0",
    "use 2 s of processor": "import time\nwhile time.process_time() < 2: pass\nTrue",
    "flood the output": "import os\nfor _ in range(100): os.write(1, b'x' * 65536)\nTrue",
    "flood the errors": "import os\nfor _ in range(100): os.write(2, b'x' * 65536)\nTrue",
    "fill the disk with one file": "open('big', 'wb').write(b'x' * (20 << 20)) > 0",
    "fill the disk with many files": "import time\nfor i in range(20): open(str(i), 'wb').write(b'x' * (1 << 20))\n"
    "time.sleep(1.0)\nTrue",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (500, 600)) is None",
    "follow a symbolic link": "import os; os.symlink('{secret}', 'link'); open('link').read() == 'secret'",
    "make a hard link": "import os; os.link('{secret}', 'hard'); True",
    "make a pipe in a folder": "import os; os.mkfifo('fifo') is None",
    "make a folder": "import os; os.mkdir('folder') is None",
    "memfd": "import os; os.memfd_create('x') > 0",
    "user namespace": LIBC + "libc.unshare(0x10000000) == 0",
    "io_uring": LIBC + "libc.syscall(425, 4, ctypes.create_string_buffer(120)) > 0 or os.strerror(ctypes.get_errno())",
    "shared memory": LIBC + "libc.shmget(0, 4096, 0o1600) >= 0 and libc.shmctl(libc.shmget(0, 64, 0o1600), 0, 0) == 0",
}
CHEATS = {
    "leave with status 0": "import sys\nsys.exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "leave from the function": "lambda x: __import__('os')._exit(0)",
    "print a verdict": "print('[1, 1, 1]')\nprint('passed', 'reward 1.0', '{\"tests\": 1.0}')\nf = lambda x: 0",
    "write a report": """
import os, sys
frame = sys._getframe()
while frame:
    nonce = frame.f_locals.get("nonce")
    if nonce: os.write(3, (nonce + '{"shown": "", "data": [[true], [true], [true], [true]]}').encode()); os._exit(0)
    frame = frame.f_back
""",
    "equal to everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
f = lambda x: Any(0)
""",
    "equal lists": "class L(list):\n    __eq__ = lambda self, other: True\nf = lambda x: L()",
    "replace json": "import json\njson.dumps = lambda *a, **k: 'true'\njson.load = lambda f: []\nf = lambda x: True",
    "replace builtins": "import builtins\nbuiltins.open = builtins.eval = builtins.len = lambda *a: True\nf = len",
    "patch at exit": "import atexit\natexit.register(print, 'passed')\nf = lambda x: None",
    "read the tests": "import os\nf = lambda x: [open(n).read() for n in os.listdir('.')][0]",
    "leave files for later": "open('answer.py', 'w').write('f = 1')\nopen('verdict', 'w').write('1')\nf = lambda x: 1",
    "trace the grader": """
import sys
def hook(frame, event, argument):
    if "results" in frame.f_locals: frame.f_locals["results"][:] = [[True]] * 12
    return hook
sys.settrace(hook)
f = lambda x: True
""",
    "search memory": """
import gc
def f(x):
    for found in gc.get_objects():
        if isinstance(found, dict) and ("outputs" in found and isinstance(found["outputs"], list)):
            return found["outputs"]
    raise ValueError
""",
    "never end": "while True: pass",
    "not data": "lambda x: {1, 2}",
    "not a function": "7",
    "true for one": "lambda x: True",
}
LIMITS = Limits(wall_s=6.0, cpu_s=1)
WIDE = Limits(wall_s=30.0, cpu_s=1, output_bytes=64 << 20, disk_bytes=64 << 20)
"""For sandbox=none, where these hold too, but not that of the processor."""


async def attack(kind: str, folder: Path) -> dict[str, object]:
    """Run all; name -> True where it succeeded, else how it ended. Holds what is attacked."""
    secret, outside = folder / "secret", folder / "outside"
    outside.mkdir()
    secret.write_text("secret")
    secret.chmod(0o600)
    (outside / "spare").touch()
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(str(outside / "socket"))
    listeners[2].bind(f"\0shoal-{os.getpid()}")
    listeners[1].listen()
    listeners[2].listen()
    places = {"secret": secret, "outside": outside, "pid": os.getpid(), "port": listeners[0].getsockname()[1]}
    sandbox = open_sandbox(kind)
    limits = WIDE if kind == "none" else LIMITS
    results: dict[str, object] = {}
    for name, source in ATTACKS.items():
        victim = outside / "victim"
        victim.write_text("precious")
        victim.chmod(0o600)
        before = victim.stat()
        for key, value in places.items():
            source = source.replace(f"{{{key}}}", str(value))
        done = await sandbox.run(source, limits=limits, collect=True)
        harmed = victim.read_text() != "precious" or victim.stat().st_mode != before.st_mode
        harmed |= max(len(done.stdout), len(done.stderr)) > LIMITS.output_bytes
        harmed |= sum(map(len, done.files.values())) > LIMITS.disk_bytes
        results[name] = done.value is True or harmed or f"{done.exit}: {done.text[-80:]}"
    for _ in range(20 if kind == "none" else 1):  # an orphan that may live is waited for on a busy machine
        await asyncio.sleep(0.5)
        if (outside / "orphan").exists():
            break
    results["leave an orphan"] = (outside / "orphan").exists()
    sandbox.close()
    return results


def cheat(kind: str) -> dict[str, object]:
    """Answer a task with each; name -> True where it earned something or spoilt the task after it, else what it got."""
    from envs.library.py_code import PyCode

    env = PyCode(sandbox=kind)
    results: dict[str, object] = {}
    for name, answer in CHEATS.items():
        env.reset(seed=0)
        reward = env.step(answer)[1]
        env.reset(seed=3)
        solved = env.step(env.code)[1]
        results[name] = reward != 0.0 or solved != 1.0 or f"reward {reward:g}"
    env.close()
    return results


if __name__ == "__main__":
    kind, what = sys.argv[1:]
    if what == "cheats":
        print(json.dumps(cheat(kind)))
    else:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(asyncio.run(attack(kind, Path(name)))))
