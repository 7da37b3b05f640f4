"""The endpoint that agents call: the real openai client and a real agent framework, on the shipped warm start."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from conf.loading import load_config
from rl.cluster.inprocess import build_pool
from rl.serving import Counter
from rollout.dialects.dialect import make_dialect
from rollout.record.recorder import Recorder
from rollout.record.trajectory import StopReason
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.chat_request import ApiError, read_chat
from rollout.serve.serving_session import SessionEnd
from tests.fakes import ScriptedEngine
from tests.policy.engine_cases import needs_vllm
from tests.rl.calculator_agent import play, run_tool
from tests.rl.served_session import serve_one


@pytest.mark.parametrize("engine", ["local", pytest.param("vllm", marks=needs_vllm)])
def test_the_openai_client_plays_a_tool_task_and_every_recorded_token_is_one_that_the_engine_sampled(
    engine: str,
) -> None:
    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        answer = await play(client, session)
        await http.post(f"/v1/sessions/{session['session_id']}/reward", json={"answer": answer})

    # the likeliest tokens are a call: vLLM takes no seed
    rows, sampled = serve_one(lead, engine_kind=engine, temperature=0.1)
    (row,) = rows
    assert row.engine == engine and row.reward in (0.0, 1.0)
    assert row.num_turns == len(sampled) >= 2, "a call and an answer, in one token row"
    assert row.token_ids[row.loss_mask == 1].tolist() == [i for c in sampled for i in c.token_ids.tolist()]
    assert row.rollout_logprobs[row.loss_mask == 1].tolist() == [x for c in sampled for x in c.logprobs.tolist()]
    assert set(row.policy_versions[row.loss_mask == 1].tolist()) == {0}


def test_a_rewritten_history_forks_a_row_streams_come_as_deltas_and_an_aborted_session_has_no_reward() -> None:
    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        ask = client.chat.completions.create
        common = {"model": "shoal", "extra_headers": {"x-shoal-session": session["session_id"]}}
        tools = session["task"]["tools"]
        stream = await ask(messages=[{"role": "user", "content": "2+3=?"}], tools=tools, stream=True, **common)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason
        await ask(messages=[{"role": "user", "content": "rewritten"}], tools=tools, **common)
        with pytest.raises(openai.BadRequestError, match="top_p"):
            await ask(messages=[{"role": "user", "content": "x"}], top_p=0.5, **common)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await ask(messages=[{"role": "user", "content": "x"}], temperature=0.5, **common)
        await http.delete(f"/v1/sessions/{session['session_id']}")

    rows, sampled = serve_one(lead)
    assert len(rows) == len(sampled) == 2
    for row, completion in zip(rows, sampled, strict=True):
        assert row.token_ids[row.loss_mask == 1].tolist() == completion.token_ids.tolist()
        assert row.reward is None and row.stop_reason == StopReason.ENV_ERROR


def test_a_wrong_key_and_another_servers_name_are_refused() -> None:
    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        assert (await http.get("/v1/models", headers={"authorization": "Bearer x"})).status_code == 401
        assert (await http.get("/v1/models", headers={"host": "evil.example"})).status_code == 403
        await http.post(f"/v1/sessions/{session['session_id']}/reward", json={"reward": 0.5})

    rows, _ = serve_one(lead)
    assert rows[0].reward == 0.5 and not rows[0].is_trainable, "no token was sampled"


def test_of_a_served_mix_sessions_get_a_task_of_each_environment_in_turn(tmp_path: Path) -> None:
    async def run() -> list[tuple[str, str]]:
        config = load_config(["env=mix", "cluster=inprocess"])
        with closing(Recorder(tmp_path / "trajectories.db")) as recorder:
            counter = Counter(
                config=config,
                desk=AgentDesk(),
                host=build_pool(config),
                engine=ScriptedEngine(lambda prompt_ids, rng: [1]),
                dialect=make_dialect(config.policy),
                recorder=recorder,
                deadline_s=30.0,
            )
            sessions = [await counter.make({"task": True}) for _ in range(4)]
            for session in sessions:
                session.finish(SessionEnd(kind="abort", text="seen enough"))
            await asyncio.wait(counter.running, timeout=10)
        return [(session.facts["env_name"], session.facts["env_id"]) for session in sessions]

    calculator, gate = ("calculator", "Calculator-v0"), ("tool_gate", "ToolGate-v0")
    assert asyncio.run(run()) == [calculator, gate, ("shop_db", "ShopDB-v0"), calculator]


@pytest.mark.slow
def test_an_agent_framework_plays_through_the_endpoint() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def lead(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        own = openai.AsyncOpenAI(base_url=session["base_url"], api_key="key", max_retries=0)
        agent = Agent(OpenAIChatModel("shoal", provider=OpenAIProvider(openai_client=own)))

        def tool(name: str) -> Callable[[int, int], str]:
            def run(a: int, b: int) -> str:
                return run_tool(name, f'{{"a": {a}, "b": {b}}}')

            run.__name__ = name
            return run

        for name in ("add", "sub", "mul"):
            agent.tool_plain(tool(name))
        result = await agent.run(session["task"]["messages"][0]["content"])
        await http.post(f"/v1/sessions/{session['session_id']}/reward", json={"answer": str(result.output)})

    rows, sampled = serve_one(lead)
    assert rows[-1].stop_reason == StopReason.TERMINATED and rows[-1].reward is not None
    ids = [i for row in rows for i in row.token_ids[row.loss_mask == 1].tolist()]
    assert ids == [i for c in sampled for i in c.token_ids.tolist()]


@pytest.mark.slow
def test_a_session_that_its_agent_forgets_ends_at_its_deadline_and_is_scored_as_it_stands() -> None:
    async def forget(client: openai.AsyncOpenAI, http: httpx.AsyncClient, session: dict) -> None:
        await client.chat.completions.create(
            model=session["model"],
            messages=session["task"]["messages"],
            tools=session["task"]["tools"],
            extra_headers={"x-shoal-session": session["session_id"]},
        )

    rows, sampled = serve_one(forget, deadline_s=3.0)
    assert [row.stop_reason for row in rows] == [StopReason.DEADLINE]
    assert rows[0].reward == 0.0 and rows[0].num_sampled_tokens == len(sampled[0].token_ids)


def test_a_field_that_would_change_the_distribution_is_refused_by_name() -> None:
    body = {"model": "shoal", "messages": [{"role": "user", "content": "x"}]}
    assert read_chat(body | {"top_p": 1, "n": 1, "user": "me"}).temperature is None
    for field, value in {"top_p": 0.9, "n": 0, "stop": [""], "logit_bias": {"1": 2}, "guided_json": {}}.items():
        with pytest.raises(ApiError) as refused:
            read_chat(body | {field: value})
        assert refused.value.param == field and refused.value.code == 400
