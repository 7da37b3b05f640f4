"""A transformers checkpoint folder, made by others, trains and evaluates end to end: policy=hf policy.path=DIR."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, set_seed
from transformers.models.qwen3_5 import Qwen3_5TextConfig

from policy.model.checkpoint_io import to_numpy_tensors
from policy.model.hf_model import HfModel
from rl.cli.main import main
from rl.runs.checkpoint import load_latest
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import read_audit
from rollout.record.recorder import TrajectoryReader

TEMPLATE = (
    "{#- tools: not shown -#}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
WORDS = (
    "env=calculator", "cluster=inprocess", "steps=2", "rollout.groups_per_step=2", "rollout.group_size=3",
    "rollout.max_turn_tokens=10", "engine.max_model_tokens=64", "engine.max_running=8", "engine.max_sessions=16",
    "learner.loss.advantage=tests.rl.training:first_is_best", "evaluation.every=0", "evaluation.final_tasks=4",
    "monitor.wandb=disabled", "monitor.progress=false",
)  # fmt: skip


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Bytes, marks of turns and calls, a template; no token of more than one byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(special_tokens=marks, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(params=["qwen3_5_text", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of ours or of another architecture, as transformers saves it. Its vocabulary is padded."""
    folder = tmp_path / request.param
    tokenizer = save_tokenizer(folder)
    ends = {"vocab_size": len(tokenizer) + 11, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = (
        Qwen3Config(**SHAPE, **ends, num_hidden_layers=2)
        if request.param == "qwen3"
        else Qwen3_5TextConfig(**SHAPE, **ends, **LINEAR)
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_transformers_folder_trains_and_evaluates(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    assert main(["train", "policy=hf", f"policy.path={checkpoint}", *WORDS, f"run.root={root}"]) == 0
    folder = RunFolder.resolve(root, "latest")
    audit = read_audit(folder.ledger)
    assert audit["balanced"] is True and audit["consumed"] == 4
    with TrajectoryReader(folder.trajectories) as reader:
        rows = [t for group in reader.groups("consumed") for t in group.trajectories]
    assert len(rows) == 12 and all(t.error is None and t.reward is not None for t in rows)
    before = to_numpy_tensors(HfModel(AutoModelForCausalLM.from_pretrained(checkpoint)))
    after = load_latest(folder.checkpoints).tensors["weights"]
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)

    capsys.readouterr()
    assert main(["eval", "latest", "--json", "--root", str(root)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["env"], result["n"], result["policy_version"]) == ("calculator", 4, 2)
