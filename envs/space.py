"""Gymnasium spaces of messages, so that an environment passes gymnasium's checks and works in its tools."""

from typing import Any

from gymnasium import Space

from envs.message import Message


class ActionSpace(Space[Message]):
    """Assistant messages. Plain text counts as a message without tool calls."""

    def __init__(self) -> None:
        super().__init__()

    def sample(self, mask: Any = None, probability: Any = None) -> Message:
        return Message.assistant(str(self.np_random.integers(1000)))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) or (isinstance(x, Message) and x.role == "assistant")

    @property
    def is_np_flattenable(self) -> bool:
        return False


class ObservationSpace(Space[tuple[Message, ...]]):
    """The new messages since the last assistant message."""

    def __init__(self) -> None:
        super().__init__()

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[Message, ...]:
        return (Message.user(str(self.np_random.integers(1000))),)

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(isinstance(message, Message) for message in x)

    @property
    def is_np_flattenable(self) -> bool:
        return False
