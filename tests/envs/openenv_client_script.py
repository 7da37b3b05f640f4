"""Plays a served Calculator with the real OpenEnv client, in another interpreter: prints what it saw as JSON."""

import asyncio
import json
import re
import sys

from openenv.core.generic_client import GenericEnvClient


async def play(url, seed):
    async with GenericEnvClient(base_url=url) as env:
        started = await env.reset(seed=seed, level=0)
        listed = await env.step({"type": "list_tools"})
        names = [tool["name"] for tool in listed.observation["tools"]]
        text = started.observation["messages"][0]["content"]
        left, sign, right = re.search(r"(\d+)\s*([-+*])\s*(\d+)", text).groups()
        tool = {"+": "add", "-": "sub", "*": "mul"}[sign]
        arguments = dict(zip("ab", (int(left), int(right)), strict=True))
        called = await env.step({"type": "call_tool", "tool_name": tool, "arguments": arguments})
        bad = await env.step({"type": "call_tool", "tool_name": "no_such_tool", "arguments": {}})
        ended = await env.step(
            {"type": "call_tool", "tool_name": "submit", "arguments": {"answer": called.observation["result"]}}
        )
        state = await env.state()
        return {
            "text": text,
            "tools": names,
            "bad": bad.observation["error"],
            "reward": ended.reward,
            "done": ended.done,
            "steps": state["step_count"],
        }


async def main():
    url, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps(await asyncio.gather(*(play(url, seed) for seed in range(count)))))


asyncio.run(asyncio.wait_for(main(), 60))
