"""An agent that Shoal did not write: the openai client, a loop, and tools of its own.

It takes sessions from the endpoint it was started for, 32 at a time, until that endpoint is gone:
    shoal train env=calculator agent.command="python tests/rl/calculator_agent.py"
"""

import asyncio
import json
import operator
import os

import httpx
import openai

TOOLS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
AT_ONCE = 32
MAX_TURNS = 6


def run_tool(name: str, arguments: str) -> str:
    """What a tool says, also about a call that makes no sense."""
    try:
        values = json.loads(arguments)
        return str(TOOLS[name](int(values["a"]), int(values["b"])))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error!r}"


async def play(client: openai.AsyncOpenAI, session: dict) -> str:
    """One conversation; returns the answer."""
    messages, tools = list(session["task"]["messages"]), session["task"]["tools"]
    for _ in range(MAX_TURNS):
        completion = await client.chat.completions.create(
            model=session["model"],
            messages=messages,
            tools=tools,
            extra_headers={"x-shoal-session": session["session_id"]},
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


async def serve_sessions(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    """Take one session after the other until the endpoint is gone."""
    while True:
        try:
            session = (await http.post("/v1/sessions")).raise_for_status().json()
            if session["session_id"] is None:  # none was waiting
                continue
            try:
                answer = await play(client, session)
            except openai.APIStatusError as error:  # too long a conversation, a deadline: no answer, say so
                print(error, flush=True)
                await http.delete(f"/v1/sessions/{session['session_id']}")
            else:
                await http.post(f"/v1/sessions/{session['session_id']}/reward", json={"answer": answer})
        except (httpx.TransportError, openai.APIConnectionError):
            return


async def main() -> None:
    client = openai.AsyncOpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY say where and who
    key = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    async with httpx.AsyncClient(base_url=os.environ["SHOAL_URL"], headers=key, timeout=60) as http:
        await asyncio.gather(*(serve_sessions(client, http) for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(main())
