"""Episodes led by programs of others, over OpenAI's chat format.

Read first: `external_episode`, then `serving_session` (a conversation as token rows), `chat_request` and `chat_answer`
(the format), `agent_desk` (the HTTP side), `agent_process` (programs we start).
"""
