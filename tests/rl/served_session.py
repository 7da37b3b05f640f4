"""One session on a calculator task, played by a real engine and led by a client of a test."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import openai

from conf.loading import load_config
from envs.task import Task
from policy.engine.protocol import Completion, GenerationRequest
from rl.cluster.inprocess import build_pool
from rl.cluster.learner_service import InProcessLearner
from rollout.dialects.dialect import make_dialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.swap_lock import RolloutLock
from rollout.record.trajectory import Trajectory
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.external_episode import play_session
from rollout.worker import build_engine

TASK = Task(task_id="serve/0", env_id="Calculator-v0", env_name="calculator", seed=3)
Lead = Callable[[openai.AsyncOpenAI, httpx.AsyncClient, dict], Awaitable[None]]


def serve_one(
    lead: Lead,
    *,
    deadline_s: float = 30.0,
    engine_kind: str = "local",
    temperature: float = 1.0,
    on_request: Callable[[], object] = lambda: None,
) -> tuple[list[Trajectory], list[Completion]]:
    """One session on a calculator task, led by `lead`; its trajectories and all that the engine sampled.

    `on_request` is called when the engine is asked.
    """

    async def run() -> tuple[list[Trajectory], list[Completion]]:
        config = load_config(["env=calculator", "cluster=inprocess", f"engine={engine_kind}"])
        engine, sampled = build_engine(config), []
        await engine.load_weights(await InProcessLearner(config).snapshot())  # type: ignore[arg-type]
        generate = engine.generate

        async def collect(request: GenerationRequest) -> Completion:
            on_request()
            sampled.append(await generate(request))
            return sampled[-1]

        engine.generate = collect
        settings = EpisodeSettings(
            temperature=temperature,
            max_turn_tokens=64,
            max_turns=0,
            max_model_tokens=256,
            deadline_s=deadline_s,
            seed=1,
        )
        desk = AgentDesk(tokens={"key": "agent-0"})
        await desk.listen()
        episode = asyncio.create_task(
            play_session(
                EpisodeContext(
                    task=TASK,
                    group_id="serve/0",
                    host=build_pool(config),
                    engine=engine,
                    dialect=make_dialect(config.policy),
                    settings=settings,
                    lock=RolloutLock("turn"),
                ),
                desk=desk,
            )
        )
        key = {"authorization": "Bearer key"}
        client = openai.AsyncOpenAI(base_url=f"{desk.address}/v1", api_key="key", max_retries=0)
        async with httpx.AsyncClient(base_url=desk.address, headers=key) as http:
            session = (await http.post("/v1/sessions")).json()
            await lead(client, http, session)
        rows = await asyncio.wait_for(episode, deadline_s + 10)
        await desk.close()
        await engine.close()
        return rows, sampled

    return asyncio.run(run())
