"""An environment of an OpenEnv server: `Coding = from_openenv("http://127.0.0.1:8000")`.

Spoken over the server's WebSocket, one connection for each episode, so the server may live in another interpreter or
on another machine and its packages need not fit ours. A server whose actions are MCP tool calls offers those tools; one
with an action of its own offers one tool, `act`, with the action's fields.

Every wait has a deadline. A server that cannot be reached, closes or does not answer raises InfraFault: the episode has
no reward and may be tried again. What it refuses as a bad action, or raises in a step, the policy reads.
"""

import contextlib
import functools
import json
import random
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, ClassVar

from envs.adapters.extra import load_extra
from envs.adapters.preset import preset
from envs.adapters.world import WorldEnv
from envs.errors import BadReward, InfraFault, MalformedEnvironment
from envs.message import ToolSpec
from envs.task import Problem
from envs.tool import Tool

EXTRA = "openenv"
_OURS_ALONE = ("metadata",)
"""Fields of every action and observation that are no part of the game."""
_POLICYS_FAULTS = ("VALIDATION_ERROR", "EXECUTION_ERROR")
_CLOSE_TIMEOUT_S = 1.0
_MAX_MESSAGE_BYTES = 100 * 2**20


def from_openenv(url: str, /, *, name: str = "OpenEnv", **arguments: Any) -> "type[OpenEnvEnv]":
    """An environment class for a server at "http://host:port"; `arguments` are those of OpenEnvEnv."""
    return preset(OpenEnvEnv, name, {"url": url, **arguments})


class OpenEnvEnv(WorldEnv):
    """An OpenEnv server's environment. In YAML: id envs.adapters.openenv_client:OpenEnvEnv, kwargs.url http://...

    Reward: the sum of the rewards the server gave. A server that never gave one has no reward, which is a failure.
    """

    levels: ClassVar[int] = 10
    reward_range: ClassVar[tuple[float, float]] = (-1e9, 1e9)
    max_turns = 100

    def __init__(
        self,
        *,
        url: str,
        prompt: str = "",
        reset_kwargs: Mapping[str, Any] | None = None,
        wait_s: float = 25.0,
        max_turns: int | None = None,
    ) -> None:
        """`prompt` stands before the first observation; `reset_kwargs` go to the server's reset beside seed and level.

        `wait_s` is the deadline of one message, below the environment's own, so that a silent server is told apart
        from a slow policy.
        """
        super().__init__(max_turns=max_turns)
        load_extra("websockets.sync.client", EXTRA)
        scheme, found, rest = url.rstrip("/").partition("://")
        if not found or scheme not in ("http", "https", "ws", "wss"):
            raise MalformedEnvironment(f"url={url!r} is no http://host:port")
        secure = "s" if scheme in ("https", "wss") else ""
        self._http, self._socket_url = f"http{secure}://{rest}", f"ws{secure}://{rest}/ws"
        self._prompt, self._reset_kwargs, self._wait_s = prompt, dict(reset_kwargs or {}), wait_s
        self.tool_timeout_s = wait_s + 2.0
        self._open = contextlib.ExitStack()
        self._socket: Any = None

    def task(self, rng: random.Random, level: int) -> Problem:
        self._disconnect()
        self._connect()
        self._rewards: list[float] = []
        wanted = {"seed": rng.getrandbits(31), "level": level, **self._reset_kwargs}
        shown = self._observed(self._asked("reset", wanted, refusable=False))
        self._offered = self._discover()
        return Problem(prompt="\n".join(filter(None, (self._prompt, shown))) or "Call a tool.")

    def tools(self) -> dict[str, Tool]:
        return self._offered

    def reward(self, answer: str) -> dict[str, float]:
        if not self._rewards:
            raise BadReward(f"the server at {self._http} gave no reward")
        return {"return": sum(self._rewards)}

    def hidden_state(self) -> str:
        """The seed, for a server's state cannot be seen."""
        return json.dumps([self._http, self.seed])

    def close(self) -> None:
        self._disconnect()
        super().close()

    # --- tools ---

    def _discover(self) -> dict[str, Tool]:
        schema = self._schema()
        if schema.get("title") in ("Action", "CallToolAction"):
            listed = self._asked("step", {"type": "list_tools"}, refusable=False)["observation"].get("tools", [])
            specs = [
                ToolSpec(name=t["name"], description=t.get("description", ""), parameters=t["input_schema"])
                for t in listed
            ]
            return {spec.name: Tool.from_schema(spec, self._caller(spec.name)) for spec in specs}
        fields = {name: field for name, field in schema.get("properties", {}).items() if name not in _OURS_ALONE}
        parameters = {**schema, "type": "object", "properties": fields, "additionalProperties": False}
        parameters.pop("title", None)
        parameters.pop("description", None)
        spec = ToolSpec(name="act", description=str(schema.get("description", "Act."))[:400], parameters=parameters)
        return {"act": Tool.from_schema(spec, self._act)}

    def _schema(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._http}/schema", timeout=self._wait_s) as reply:
                return json.load(reply)["action"]
        except (OSError, ValueError, KeyError) as error:
            raise InfraFault(f"{self._http}/schema: {type(error).__name__}: {error}") from None

    def _caller(self, name: str) -> Any:
        return lambda **arguments: self._act(type="call_tool", tool_name=name, arguments=arguments)

    def _act(self, **action: Any) -> str:
        if self.world_ended:
            raise RuntimeError("the episode is over")
        return self._observed(self._asked("step", action))

    # --- the wire ---

    def _connect(self) -> None:
        client = load_extra("websockets.sync.client", EXTRA)
        opening = functools.partial(client.connect, self._socket_url, proxy=None, max_size=_MAX_MESSAGE_BYTES)
        try:
            self._socket = self._open.enter_context(opening(open_timeout=self._wait_s, close_timeout=_CLOSE_TIMEOUT_S))
        except Exception as error:  # the package's own kinds of failed handshakes
            raise InfraFault(f"cannot reach {self._socket_url}: {type(error).__name__}: {error}") from None

    def _asked(self, kind: str, data: dict[str, Any], *, refusable: bool = True) -> dict[str, Any]:
        """Send a message and return what came back. Raises InfraFault, or ValueError for what the policy may read."""
        try:
            self._socket.send(json.dumps({"type": kind, "data": data}))
            reply = json.loads(self._socket.recv(timeout=self._wait_s))
        except Exception as error:  # closed, silent, or no JSON: whatever it is, the server is lost
            raise InfraFault(f"{self._socket_url} was lost: {type(error).__name__}: {error}") from None
        if reply.get("type") != "error":
            return reply["data"]
        told = reply.get("data", {})
        text = str(told.get("message", "refused"))
        if refusable and told.get("code") in _POLICYS_FAULTS:
            raise ValueError(text)
        raise InfraFault(f"{self._socket_url} refused {kind}: {told.get('code')}: {text}")

    def _observed(self, data: Mapping[str, Any]) -> str:
        if data.get("reward") is not None:
            self._rewards.append(float(data["reward"]))
        if data.get("done"):
            self.end_world()
        observation = data.get("observation", {})
        error = observation.get("error")
        if error:
            raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
        fields = {name: value for name, value in observation.items() if name not in _OURS_ALONE}
        if fields.keys() == {"tool_name", "result", "error"}:
            return _text_of_result(fields["result"])
        texts = [value for value in fields.values() if value not in (None, "", [], {})]
        if len(texts) == 1 and isinstance(texts[0], str):
            return texts[0]
        return json.dumps(fields, ensure_ascii=False) if texts else ""

    def _disconnect(self) -> None:
        self._open.close()
        self._socket = None


def _text_of_result(result: Any) -> str:
    """What an MCP tool returned: its data where it has some, else the text of its parts."""
    if isinstance(result, Mapping):
        for key in ("data", "structured_content"):
            if result.get(key) is not None:
                result = result[key]
                break
        else:
            parts = result.get("content")
            if isinstance(parts, list):
                result = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
    if isinstance(result, Mapping) and result.keys() == {"result"}:
        result = result["result"]
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
