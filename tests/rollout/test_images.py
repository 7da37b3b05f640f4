"""Images are data: from the environment through transport and dialect to the file and back, to the byte."""

import asyncio
import base64
import hashlib
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from conf.schema import PolicyConfig
from envs.base import AgentEnv, call
from envs.check.demonstration import demonstrate
from envs.message import ImagePart, Message, TextPart, ToolResult
from envs.pool.call_batching import Mailbox
from envs.pool.client import MailboxHost, PoolService
from envs.registry import make_env
from envs.task import Task
from envs.tool import tool
from policy.model.tokenizer import HfTokenizer
from policy.sync.snapshot import PolicySnapshot
from rl.cli.main import main
from rl.runs.transcript import message_text
from rollout.dialects.dialect import Dialect, sees_images
from rollout.dialects.qwen_dialect import IMAGE_MARKS, QwenDialect
from rollout.dialects.tiny_dialect import TinyDialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.episode import run_episode
from rollout.play.swap_lock import RolloutLock
from rollout.record.recorder import Recorder, TrajectoryReader
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup
from tests.fakes import ScriptedEngine
from tests.rollout.fakes_episode import chatml_tokenizer

RED = ImagePart(data=b"\x89PNG red")
BLUE = ImagePart(data=b"\x89PNG blue")
PLACEHOLDER = "".join(IMAGE_MARKS)
SETTINGS = EpisodeSettings(
    temperature=1.0, max_turn_tokens=400, max_turns=0, max_model_tokens=20_000, deadline_s=60.0, seed=1
)


class UnannouncedImage(AgentEnv):
    """Says that it shows text only; its tool returns an image."""

    def task(self, rng: Any, level: int) -> str:
        return "look"

    @tool
    def look(self) -> ImagePart:
        """Look."""
        return RED

    def reward(self, answer: str) -> float:
        return 1.0


def tokenizer() -> HfTokenizer:
    made = chatml_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(IMAGE_MARKS)})
    return HfTokenizer(made)


def task(env_id: str, level: int) -> Task:
    return Task(task_id="train/e/0", env_id=env_id, env_name="e", seed=11, level=level)


def mailbox_host() -> MailboxHost:
    """A pool behind a mailbox; everything crosses as the bytes that another process would get."""
    service = PoolService()

    async def submit(client: str, requests: Any) -> Any:
        return pickle.loads(pickle.dumps(await service.submit(client, pickle.loads(pickle.dumps(requests)))))

    async def collect(client: str, max_wait_s: float) -> Any:
        return pickle.loads(pickle.dumps(await service.collect(client, max_wait_s)))

    return MailboxHost([Mailbox(client_id="w", submit=submit, collect=collect)])


def play(played: Task, dialect: Dialect, says: list[Message], member: int = 0) -> Trajectory:
    """One episode in which the policy says `says`."""

    async def episode() -> Trajectory:
        host = mailbox_host()
        left = iter(says)
        engine = ScriptedEngine(
            lambda ids, rng: dialect.completion(next(left), env_tools),
            vocab_size=dialect.vocab_size,
            max_model_tokens=20_000,
        )
        await engine.load_weights(PolicySnapshot.create(0, {}))
        try:
            return await run_episode(
                EpisodeContext(
                    task=played,
                    member=member,
                    group_id=played.task_id,
                    host=host,
                    engine=engine,
                    dialect=dialect,
                    settings=SETTINGS,
                    lock=RolloutLock("turn"),
                )
            )
        finally:
            await host.aclose()

    env_tools = tuple(t.spec for t in make_env(played.env_id).tools().values())
    return asyncio.run(asyncio.wait_for(episode(), 60))


def images_of(messages: tuple[Message, ...]) -> list[bytes]:
    return [part.data for message in messages for part in message.content if isinstance(part, ImagePart)]


def stored(path: Path, *trajectories: Trajectory) -> sqlite3.Connection:
    """Written as one group; what the file then holds."""
    first = trajectories[0]
    recorder = Recorder(path)
    group = TrajectoryGroup(group_id=first.group_id, task=first.task, attempt=1, trajectories=trajectories)
    recorder.write([group])
    recorder.close()
    return sqlite3.connect(path)


def test_an_episode_of_click_ui_is_stored_with_the_images_that_the_environment_drew(tmp_path: Path) -> None:
    drawn = demonstrate(make_env("ClickUI-v0"), seed=11, level=6)
    spoken = [message for message in drawn.messages if message.role == "assistant"]
    dialect = QwenDialect(tokenizer(), accepts_images=True)
    rows = [play(task("ClickUI-v0", 6), dialect, spoken, member) for member in (0, 1)]
    assert [(row.stop_reason, row.reward) for row in rows] == [(StopReason.TERMINATED, 1.0)] * 2
    expected = images_of(drawn.messages)
    assert len(expected) > 5 and all(data.startswith(b"\x89PNG") for data in expected)

    db = stored(tmp_path / "t.db", *rows)
    with TrajectoryReader(tmp_path / "t.db") as reader:
        (group,) = reader.groups("committed")
        single = reader.get("train/e/0/1").trajectory
    for row in (*group.trajectories, single):
        assert [image.data for image in row.images] == expected
        assert (row.prompt, row.turns) == (rows[0].prompt, rows[row.member].turns)
        pads = row.token_ids == dialect.tokenizer.special_id("<|image_pad|>")
        assert pads.sum() == len(row.images)
        assert not row.loss_mask[pads].any()
    # once each, whatever the number of members and of frames that repeat
    kept = dict(db.execute("SELECT sha256, data FROM images").fetchall())
    assert kept == {hashlib.sha256(data).hexdigest(): data for data in expected}
    assert group.trajectories[0].images[0].data is group.trajectories[1].images[0].data


def test_placeholders_stand_where_the_images_do() -> None:
    dialect = QwenDialect(tokenizer(), accepts_images=True)

    def shown(ids: list[int]) -> str:
        return dialect.tokenizer.decode(ids)

    user = Message(role="user", content=(TextPart(text=" a "), RED, TextPart(text="b"), BLUE))
    assert shown(dialect.prompt([user], [])).startswith(
        f"<|im_start|>user\na {PLACEHOLDER}b{PLACEHOLDER}<|im_end|>\n<|im_start|>assistant\n"
    )
    result = Message.tool(ToolResult(call_id="0", name="look", content=""), (RED,))
    assert f"<tool_response>\n{PLACEHOLDER}\n</tool_response>" in shown(dialect.reply([result, result], []))
    ids = dialect.prompt([Message(role="user", content=(TextPart(text=PLACEHOLDER), RED))], [])
    for mark in IMAGE_MARKS:  # spelled out in a text it stays text
        assert ids.count(dialect.tokenizer.special_id(mark)) == 1
        assert dialect.tokenizer.special_id(mark) in dialect.banned_token_ids
    with pytest.raises(ValueError, match="no image in a system message"):
        dialect.prompt([Message(role="system", content=(RED,))], [])


def test_text_only_dialects_refuse_images_and_tokenizers_without_the_marks_are_refused() -> None:
    user = Message(role="user", content=(RED,))
    for dialect in (TinyDialect(), QwenDialect(tokenizer())):
        assert not dialect.accepts_images
        with pytest.raises(ValueError, match="renders text only, but a user message holds an image"):
            dialect.prompt([user], [])
    with pytest.raises(ValueError, match="vision_start"):
        QwenDialect(HfTokenizer(chatml_tokenizer()), accepts_images=True)
    assert not any(sees_images(PolicyConfig(dialect=dialect)) for dialect in ("tiny", "qwen3_5", "chat_template"))


def test_an_image_in_the_middle_of_a_text_only_episode_is_a_recorded_failure(tmp_path: Path) -> None:
    row = play(task(f"{__name__}:UnannouncedImage", 0), TinyDialect(), [call("look")])
    assert row.error is not None
    assert (row.stop_reason, row.reward, row.error.kind, row.error.where) == (
        StopReason.ENV_ERROR,
        None,
        "policy",
        "render",
    )
    assert "'tiny' renders text only, but a tool message holds an image" in row.error.message
    stored(tmp_path / "t.db", row)
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert reader.get(1).trajectory.images == (RED,)


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("env", ["chart_qa", "click_ui"])
def test_a_text_only_policy_is_refused_before_anything_starts(
    command: str, env: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, f"env={env}"]) == 2
    told = capsys.readouterr().err
    assert {"chart_qa": "ChartQA-v0", "click_ui": "ClickUI-v0"}[env] in told
    assert "dialect 'tiny'" in told and "Choose an environment of text: shoal env list" in told
    assert list(tmp_path.iterdir()) == []


def test_a_mix_with_one_image_environment_is_refused_by_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "env=mix", "+env.mix.ui.id=ClickUI-v0", "dry_run=true"]) == 2
    assert "env.mix.ui.id=ClickUI-v0 shows images" in capsys.readouterr().err


def test_people_read_size_and_hash_of_an_image() -> None:
    message = Message(role="user", content=(RED, TextPart(text="what is it?")))
    sha256 = hashlib.sha256(RED.data).hexdigest()[:12]
    assert message_text(message) == f"     user: [image/png, 8 bytes, sha256 {sha256}] what is it?"


def test_a_file_of_layout_1_is_read_and_continued(tmp_path: Path) -> None:
    row = play(task(f"{__name__}:UnannouncedImage", 0), TinyDialect(), [call("look")])
    db = stored(tmp_path / "t.db", row)
    inline = f'"image":"{base64.b64encode(RED.data).decode()}"'  # what layout 1 wrote
    (turns,) = db.execute("SELECT turns FROM trajectories").fetchone()
    reference = f'"image_sha256":"{hashlib.sha256(RED.data).hexdigest()}"'
    assert reference in turns
    with db:
        db.execute("UPDATE trajectories SET turns = ?", (turns.replace(reference, inline),))
        db.execute("DROP TABLE images")
        db.execute("ALTER TABLE trajectories DROP COLUMN engine")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert reader.get(1).trajectory.images == (RED,)
    stored(tmp_path / "t.db", row).close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [reader.get(n).trajectory.images for n in (1, 2)] == [(RED,)] * 2


def test_a_lost_image_is_named(tmp_path: Path) -> None:
    row = play(task(f"{__name__}:UnannouncedImage", 0), TinyDialect(), [call("look")])
    with stored(tmp_path / "t.db", row) as db:
        db.execute("DELETE FROM images")
    with TrajectoryReader(tmp_path / "t.db") as reader, pytest.raises(LookupError, match="lacks image"):
        reader.get(1)
