"""An episode as a person reads it."""

import hashlib

from envs.message import ContentPart, Message, TextPart
from rollout.record.trajectory import Trajectory


def message_text(message: Message) -> str:
    """One message on a few lines: role, text, calls; of an image its size and hash."""
    calls = [
        f"[call {call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})]"
        + (f" malformed: {call.error}" if call.error else "")
        for call in message.tool_calls
    ]
    content = [shown for shown in map(_part_text, message.content) if shown]
    return f"{message.role:>9}: " + " ".join([*content, *calls])


def _part_text(part: ContentPart) -> str:
    if isinstance(part, TextPart):
        return part.text
    return f"[{part.media_type}, {len(part.data)} bytes, sha256 {hashlib.sha256(part.data).hexdigest()[:12]}]"


def transcript_text(trajectory: Trajectory) -> str:
    """The whole conversation, then its end and reward."""
    lines = [message_text(message) for message in trajectory.prompt]
    for turn in trajectory.turns:
        lines.append(message_text(turn.message))
        lines.extend(message_text(message) for message in turn.reply)
    reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}"
    lines.append(f"   {'ended':>6}: {trajectory.stop_reason}, reward {reward}")
    return "\n".join(lines)
