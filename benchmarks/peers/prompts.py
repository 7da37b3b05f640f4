"""How the peer turns conversations into token ids: run by the peer's Python, which has transformers of its own.

python prompts.py CHECKPOINT < conversations.json     [{"messages": [...], "task": "tool" | "reverse"}, ...]
writes one JSON list with the token ids of each, as GRPOTrainer renders them.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import task
from transformers import AutoTokenizer


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    ids = [
        tokenizer.apply_chat_template(
            conversation["messages"],
            tools=[task.add] if conversation["task"] == "tool" else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for conversation in json.load(sys.stdin)
    ]
    print(json.dumps(ids))


if __name__ == "__main__":
    main()
