"""A run folder whose every text is hostile, and a dashboard server in a process of its own."""

import asyncio
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from conf.loading import load_config, resolved_yaml
from envs.message import ImagePart, Message, TextPart, ToolCall, ToolResult
from envs.task import Task
from rl.dashboard.security import Access
from rl.dashboard.server import make_app
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import Ledger
from rollout.record.recorder import Recorder, TrainedRow
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup, Turn

Ask = Callable[..., httpx.Response]
RUN = "run-a"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
XSS = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028</title>\x1b[31m"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001e221bc33"
    "0000000049454e44ae426082"
)


def make_run(root: Path, *settings: str) -> Path:
    """Two groups of two, one trained at step 2 and one waiting; three steps, an evaluation, events, spans, a log.

    Its settings are ours: a test must not read a key that no run has."""
    folder = RunFolder.create(root, "calc", "tiny", name=RUN)
    folder.write_config(_config("seed=1", "steps=3", *settings))
    (folder.path / "manifest.json").write_text(json.dumps({"argv": [XSS]}))
    steps = [
        {
            "kind": "step",
            "step": n,
            "policy_version": n,
            "time_s": n * 2.0,
            "reward/mean": 0.25 * n,
            "trainer/tokens": 10.0,
        }
        | {"rows/trained": 4.0, f"reward/{XSS}": 0.5, "policy/entropy": None if n == 2 else 1.0}
        for n in (1, 2, 3)
    ]
    rows = [{"kind": "evaluation", "step": 0, "time_s": 0.5, "eval/success": 0.25, "eval/n": 100}, *steps]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [
        {"kind": "checkpoint", "time_s": 1.0, "step": 1},
        {"kind": "worker_lost", "worker": "worker-0", "error": XSS},
    ]
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    spans = [
        {"process": "worker-0", "activity": "generate", "start_s": 0.0, "end_s": 1.5},
        {"process": "learner", "activity": "train", "start_s": 1.5, "end_s": 2.0},
    ]
    folder.spans.write_text("".join(json.dumps(row) + "\n" for row in spans))
    (folder.logs / "worker-0.log").write_text(f"hello from the log\n{XSS}\n")
    groups = [_group("train/calc/0", (1.0, 0.0)), _group("train/calc/1", (0.5, None))]
    recorder = Recorder(folder.trajectories)
    recorder.write(groups)
    trained = [
        TrainedRow(trajectory_id=t.trajectory_id, advantage=a, learner_logprobs=np.where(t.loss_mask == 1, -0.5, 0.0))
        for t, a in zip(groups[0].trajectories, (1.0, -1.0), strict=True)
    ]
    recorder.mark_consumed(2, trained)
    recorder.close()
    ledger = Ledger(folder.ledger)
    ledger.issue([group.task for group in groups])
    for group in groups:
        attempt = ledger.lease(group.group_id, "worker-0", 60.0)
        ledger.commit(group.group_id, attempt, "digest")
    ledger.consume([groups[0].group_id], step=2)
    ledger.close()
    return folder.path


@functools.cache
def _config(*settings: str) -> str:
    return resolved_yaml(load_config(settings))


def _group(group_id: str, rewards: tuple[float | None, ...]) -> TrajectoryGroup:
    task = Task(task_id=group_id, env_id="Calc-v0", env_name="calc", seed=2**70, level=3)
    members = tuple(_trajectory(group_id, task, member, reward) for member, reward in enumerate(rewards))
    return TrajectoryGroup(group_id=group_id, task=task, attempt=1, trajectories=members)


def _trajectory(group_id: str, task: Task, member: int, reward: float | None) -> Trajectory:
    mask = np.array([0, 0, 1, 1, 0, 1], np.uint8)
    call = Message(
        role="assistant",
        content=(TextPart(text=XSS),),
        tool_calls=(ToolCall(name=XSS, arguments={XSS: XSS}, call_id="0"),),
    )
    result = Message(role="tool", tool_result=ToolResult(call_id="0", name=XSS, content=XSS, error=None))
    return Trajectory(
        trajectory_id=f"{group_id}/{member}",
        group_id=group_id,
        task=task,
        member=member,
        token_ids=np.array([258, 65, 60, 62, 261, 257], np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask == 1, -1.0, 0.0).astype(np.float32),
        policy_versions=np.array([-1, -1, 0, 0, -1, 1], np.int32),
        turns=(Turn(start=2, end=4, message=call, reply=(result,)), Turn(start=5, end=6, message=call)),
        prompt=(Message(role="user", content=(TextPart(text=XSS), ImagePart(data=PNG, media_type="text/html"))),),
        reward=reward,
        reward_parts={XSS: 1.0},
        stop_reason=StopReason.TERMINATED,
        temperature=1.0,
        meta={"printed": XSS},
        worker="worker-0",
        seconds=2.0,
        env_seconds=0.5,
    )


def metric_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def client(root: Path, access: Access | None = None) -> Ask:
    """Asks a dashboard over `root` in this process: ask(path, headers=..., **query)."""
    app = make_app(root, access or Access())

    def ask(path: str, headers: dict[str, str] | None = None, method: str = "GET", **query: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8765") as client:
                return await client.request(method, path, headers=headers, params=query or None)

        return asyncio.run(send())

    return ask


def start_server(root: Path, *words: str, port: int = 0, has_token: bool = False) -> tuple[subprocess.Popen, str]:
    """`shoal dash` over `root`; the process and the address that it printed. Without `has_token` it asks for none."""
    command = [sys.executable, "-m", "rl.cli", "dash", "--root", str(root), "--port", str(port), *words]
    command += [] if has_token else ["--no-token"]  # an address without a query, to which views are added
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert server.stdout is not None
    address = server.stdout.readline().strip()  # ends with the process, should it fail to start
    assert address.startswith("http://"), "the server did not start"
    return server, address


def until(page: Any, condition: str, timeout: float = 30_000) -> None:
    """Wait for a JavaScript condition. Playwright's own waiting evaluates text in the page, which its CSP refuses."""
    deadline = time.monotonic() + timeout / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition}: {page.inner_text('#view')[:300]}"
        time.sleep(0.05)


def save_picture(page: Any, folder: Path, name: str) -> None:
    """Into docs/images where SHOAL_SCREENSHOTS is set, else below `folder`. Two tests must not save one name: the docs
    would show whichever ran last."""
    folder = IMAGES if os.environ.get("SHOAL_SCREENSHOTS") else folder / "pictures"
    folder.mkdir(exist_ok=True)
    path = folder / f"dashboard-{name}.png"
    height = page.evaluate("Math.min(innerHeight, document.getElementById('view').getBoundingClientRect().bottom)")
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height})
    assert path.stat().st_size > 5_000
