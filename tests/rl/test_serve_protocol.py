"""What clients send beside the plain request: retries, stop texts, choices, demanded calls, other addresses."""

import asyncio
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conf.loading import load_config, read_config, resolved_yaml
from policy.model.hybrid_config import PRESETS
from policy.sync.snapshot import PolicySnapshot
from policy.vllm.core import VllmCore
from rl.cli.serve_command import _untrained
from rl.cluster.inprocess import build_pool
from rl.serving import Counter
from rollout.dialects.dialect import make_dialect
from rollout.record.recorder import Recorder
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.chat_request import ApiError, read_chat
from rollout.serve.history import canonical
from rollout.serve.serving_session import SessionEnd
from rollout.worker import vllm_settings
from tests.fakes import ScriptedEngine
from tests.rl.served_session import serve_one

ASK = {"model": "shoal", "messages": [{"role": "user", "content": "2+3=?"}], "max_tokens": 8}


def test_a_retry_gets_the_stored_answer_and_an_equal_request_sent_on_purpose_is_sampled_again() -> None:  # faults H2
    answers: list[dict[str, Any]] = []

    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        url = f"/sessions/{session['session_id']}/v1/chat/completions"
        for headers in ({}, {"x-stainless-retry-count": "1"}, {}):
            answers.append((await http.post(url, json=ASK, headers=headers)).json())
        await http.delete(f"/v1/sessions/{session['session_id']}")

    rows, sampled = serve_one(lead)
    first, retried, again = answers
    assert first == retried and first["id"] != again["id"]
    assert len(sampled) == len(rows) == 2


def test_a_stream_that_broke_is_answered_again_without_sampling() -> None:  # faults H2
    ids: list[str] = []
    asked = asyncio.Event()

    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        url = f"/sessions/{session['session_id']}/v1/chat/completions"
        broken = asyncio.create_task(http.post(url, json=ASK))
        await asyncio.wait_for(asked.wait(), 20)
        broken.cancel()
        await asyncio.sleep(0.5)
        ids.append((await http.post(url, json=ASK)).json()["id"])
        await http.delete(f"/v1/sessions/{session['session_id']}")

    _, sampled = serve_one(lead, on_request=asked.set)
    assert len(ids) == 1 and len(sampled) == 1


def test_renamed_call_ids_and_retyped_arguments_continue_the_row() -> None:  # faults H2
    def spelled(call_id: str, arguments: dict[str, Any]) -> list[str]:
        call = {"id": call_id, "type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}
        messages = [
            {"role": "user", "content": "2+3=?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": "5"},
        ]
        return canonical(read_chat(ASK | {"messages": messages}).messages)

    assert spelled("call_0_0", {"a": "2", "b": "3"}) == spelled("toolu_x9", {"b": 3, "a": 2.0})
    assert spelled("call_0_0", {"a": "2", "b": "3"}) != spelled("call_0_0", {"a": "2", "b": "4"})


def test_fields_that_agents_send_are_served() -> None:  # faults H4
    chat = read_chat(
        ASK
        | {"stop": "END", "parallel_tool_calls": False, "response_format": {"type": "text"}, "n": 2, "top_p": 1.0}
        | {"top_logprobs": 3, "logprobs": True, "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"}
    )
    assert (chat.stop, chat.one_call, chat.choices, chat.top_logprobs) == (("END",), True, 2, True)
    for field, value in {"response_format": {"type": "json_object"}, "tool_choice": "required"}.items():
        with pytest.raises(ApiError) as refused:  # no engine forces a grammar; there is no tool to demand
            read_chat(ASK | {field: value})
        assert refused.value.param == field


def test_two_choices_are_two_rows_and_a_demanded_call_is_a_call() -> None:  # faults H4
    seen: list[dict[str, Any]] = []

    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        url = f"/sessions/{session['session_id']}/v1/chat/completions"
        seen.append((await http.post(url, json=ASK | {"n": 2})).json())
        demanded = ASK | {"tools": session["task"]["tools"], "max_tokens": 60}
        demanded |= {"tool_choice": {"type": "function", "function": {"name": "mul"}}}
        seen.append((await http.post(url, json=demanded)).json())
        await http.delete(f"/v1/sessions/{session['session_id']}")

    rows, sampled = serve_one(lead, temperature=0.1)
    both, demanded = seen
    assert [choice["index"] for choice in both["choices"]] == [0, 1] and len(rows) == len(sampled) == 3
    (call,) = demanded["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "mul"
    given = rows[-1].token_ids[rows[-1].loss_mask == 0]
    assert bytes(given[-3:].tolist()) == b"mul", "what was demanded is given, not sampled: it is not trained"


def test_addresses_that_clients_try_answer_and_what_is_not_there_is_refused_in_json() -> None:  # faults H4
    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        assert (await http.get("/health")).json()["status"] == "ok"
        assert (await http.get("/v1/models/shoal")).json()["id"] == "shoal"
        for method, path, code in (("GET", "/v1/models/gpt", 404), ("GET", "/v1/x", 404), ("PUT", "/v1/sessions", 405)):
            answer = await http.request(method, path)
            assert answer.status_code == code and answer.json()["error"]["message"]
        await http.delete(f"/v1/sessions/{session['session_id']}")

    serve_one(lead)


@pytest.mark.slow
def test_a_program_that_names_no_session_is_served_and_each_conversation_recorded(tmp_path: Path) -> None:  # faults H4
    """The example of the help: OPENAI_BASE_URL and a program that knows nothing of sessions. 200 at once (H6)."""

    async def run() -> int:
        config = load_config(["env=calculator", "cluster=inprocess"])
        with closing(Recorder(tmp_path / "trajectories.db")) as recorder:
            desk, stop = AgentDesk(), make_dialect(config.policy).stop_token_ids[0]
            engine = ScriptedEngine(lambda prompt_ids, rng: [65, 66, stop])
            await engine.load_weights(PolicySnapshot.create(0, {}))
            counter = Counter(
                config=config,
                desk=desk,
                host=build_pool(config),
                engine=engine,
                dialect=make_dialect(config.policy),
                recorder=recorder,
                deadline_s=60.0,
            )
            desk.make_session = counter.make
            await desk.listen()
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(base_url=desk.address, limits=limits, timeout=60) as http:

                async def converse(name: int) -> None:
                    messages = [{"role": "user", "content": f"number {name}"}]
                    for _ in range(2):
                        answer = (await http.post("/v1/chat/completions", json=ASK | {"messages": messages})).json()
                        assert "choices" in answer, answer
                        messages += [answer["choices"][0]["message"], {"role": "user", "content": "go on"}]

                await asyncio.gather(*map(converse, range(200)))
            sessions = desk.session_ids()
            for session_id in sessions:
                desk.find(session_id).finish(SessionEnd(kind="abort", text="done"))
            await asyncio.wait(counter.running, timeout=30)
            await desk.close()
        return len(sessions)

    assert asyncio.run(run()) == 200, "one session for each conversation, not one for each request"


def test_conversations_may_be_served_that_are_longer_than_the_learners_micro_batch() -> None:  # faults H5
    words = ["engine.max_model_tokens=32768"]
    config = read_config(resolved_yaml(load_config(["env=calculator"])), [*_untrained(words), *words])
    assert config.engine.max_model_tokens == 32768


def test_ranks_of_one_engine_are_processes_of_its_worker_also_under_ray() -> None:  # faults H3
    words = ["engine=vllm", "cluster.address=10.0.0.1:6379", "engine.vllm.tensor_parallel=2"]
    settings = vllm_settings(load_config([*words, "cluster=gpu_separate", "cluster.worker_gpus=2"]))
    arguments = VllmCore(PRESETS["tiny_hybrid"], settings)._arguments("folder", returns_routes=False)
    assert arguments["distributed_executor_backend"] == "mp"
