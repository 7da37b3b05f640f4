"""Agent programs that somebody else wrote: started, given an address and a key, watched, started again.

A program finds OPENAI_BASE_URL, OPENAI_API_KEY and SHOAL_URL in its environment. It asks SHOAL_URL/v1/sessions for one
session after the other, as many at a time as it likes, until the connection is refused or it is terminated.

Waits for / woken by: the watch of a program waits for its exit; `close` waits for it at most `END_TIMEOUT_S`.
"""

import asyncio
import logging
import os
import secrets
import shlex
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from contextlib import suppress

from rollout.serve.agent_desk import AgentDesk

log = logging.getLogger(__name__)

MAX_DEATHS = 10
"""Ends of programs, all together, before the crew gives up: a program that cannot work dies at once, each time."""
RESTART_PAUSE_S = 1.0
END_TIMEOUT_S = 5.0
KEPT_LINES = 20


class AgentLost(RuntimeError):
    """Raised when the agent programs keep ending; the message holds the last output."""


class AgentCrew:
    """`processes` copies of a command, all served by one desk.

    Example: crew = AgentCrew("python my_agent.py", processes=2); await crew.start(); crew.desk.offer(session)
    """

    def __init__(self, command: str, *, processes: int) -> None:
        self._command = shlex.split(command)
        keys = {secrets.token_urlsafe(24): f"agent-{n}" for n in range(processes)}
        self.desk = AgentDesk(tokens=keys)
        self._keys = keys
        self._processes: dict[str, Process] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._deaths = 0
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._starting = asyncio.Lock()
        self._closing = False

    async def start(self) -> None:
        """Listen and start the programs, once. Raises `AgentLost` where they have ended too often."""
        async with self._starting:
            if not self._watches:
                await self.desk.listen()
                self._watches = [asyncio.create_task(self._watch(key, name)) for key, name in self._keys.items()]
        if self._deaths > MAX_DEATHS:
            raise AgentLost(f"{shlex.join(self._command)} ended {self._deaths} times: {' | '.join(self._last_lines)}")

    async def close(self) -> None:
        """End the programs and the desk. Safe to call twice."""
        self._closing = True
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
        if self._watches:
            await asyncio.wait(self._watches, timeout=END_TIMEOUT_S)
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)
        for watch in self._watches:
            watch.cancel()
        await self.desk.close()

    async def _watch(self, key: str, name: str) -> None:
        environment = os.environ | {
            "OPENAI_BASE_URL": f"{self.desk.address}/v1",
            "OPENAI_API_KEY": key,
            "SHOAL_URL": self.desk.address,
        }
        while not self._closing and self._deaths <= MAX_DEATHS:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment, start_new_session=True
                )
            except OSError as error:  # no such program: counted like an end
                why = f"cannot start {self._command[0]!r}: {error.strerror}"
                self._last_lines.append(why)
            else:
                self._processes[name] = process
                await self._read(process, name)
                why = f"the agent program {name} ended with code {await process.wait()}"
            if self._closing:
                return
            self._deaths += 1
            log.warning("%s; the last it said: %s", why, " | ".join(self._last_lines))
            self.desk.lose(name, why)
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _read(self, process: Process, name: str) -> None:
        """What it prints goes to this process's log, until it ends."""
        assert process.stdout is not None
        while chunk := await process.stdout.read(4096):  # no readline: a long line would be an error
            for line in chunk.decode("utf-8", "replace").splitlines():
                self._last_lines.append(line[:300])
                log.info("%s: %s", name, line[:2000])


def _signal(process: Process, number: signal.Signals) -> None:
    """To the program and all it started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
