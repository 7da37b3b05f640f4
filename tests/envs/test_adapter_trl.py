"""An exported environment inside TRL's own trainer: its tools are called, its reward is the trainer's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from envs.adapters.trl_env import trl_environment_factory, trl_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def byte_tokenizer() -> Any:
    """One token a byte, with the chat template of Qwen3 that TRL brings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen3_chat_template, qwen3_template

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.response_template = qwen3_template
    return tokenizer


def scripted_reply(conversation: str) -> str:
    """What an oracle of the calculator would write next."""
    left, sign, right = re.findall(r"(\d+)([-+*])(\d+)=\?", conversation)[-1]
    results = re.findall(r"<tool_response>\s*(.*?)\s*</tool_response>", conversation.split("<|im_start|>user")[-1])
    if "done" in results:
        return "finished"
    if results:
        told = {"name": "submit", "arguments": {"answer": results[-1]}}
    else:
        name = {"+": "add", "-": "sub", "*": "mul"}[sign]
        told = {"name": name, "arguments": {"a": int(left), "b": int(right)}}
    return f"<tool_call>\n{json.dumps(told)}\n</tool_call>"


def test_trl_trains_on_an_exported_environment(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="extra 'trl'")
    import torch
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads))

    class Scripted(GRPOTrainer):
        """The engine alone is scripted: a random model calls no tools. Everything behind it is TRL's."""

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):  # the answer of each row, and no log-probs
            texts = [scripted_reply(tokenizer.decode(ids)) + "<|im_end|>" for ids in prompt_ids]
            return [tokenizer(text)["input_ids"] for text in texts], None

    config = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=1500,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Scripted(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(trl_rows(8, seed=1)),
        environment_factory=trl_environment_factory("Calculator-v0"),
    )
    trainer.train()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert logged["rewards/Calculator/mean"] == 1.0, logged
    assert logged["tools/failure_frequency"] == 0.0
