"""Exports read back: episodes and numbers are those stored, weights give the same logits in transformers."""

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, set_seed

from conf.loading import load_config, resolved_yaml
from policy.model.checkpoint_io import to_numpy_tensors
from policy.model.hf_model import HfModel, load_policy_model
from rl.cli.main import main
from rl.runs.checkpoint import save_checkpoint
from rl.runs.run_folder import RunFolder
from tests.policy.tiny_models import random_tokens, starts_of
from tests.rl.dashboard_runs import RUN, XSS, make_run, metric_rows
from tests.rl.test_hf_run import SHAPE, save_tokenizer

torch.set_num_threads(1)


def _export(root: Path, out: Path, *words: str) -> dict:
    assert main(["export", RUN, *words, "--root", str(root), "-o", str(out)]) == 0
    return {path.name: path for path in out.iterdir()}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_episodes_are_exported_as_chat_messages_with_what_became_of_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    found = _export(tmp_path, tmp_path / "out")
    assert sorted(found) == ["metrics.csv", "trajectories.jsonl"]  # there is no checkpoint
    rows = _lines(found["trajectories.jsonl"])
    with closing(sqlite3.connect(tmp_path / RUN / "trajectories.db")) as db:
        stored = db.execute("SELECT row, id, status, step, reward, advantage FROM trajectories ORDER BY row").fetchall()
    told = [tuple(row[name] for name in ("row", "id", "status", "step", "reward", "advantage")) for row in rows]
    assert told == stored and rows[0]["seed"] == 2**70
    prompt, call, result, last = rows[0]["messages"]
    assert prompt["content"][0] == {"type": "text", "text": XSS}
    assert prompt["content"][1]["image_url"]["url"].startswith("data:text/html;base64,")
    assert (
        call["tool_calls"] == [{"id": "0", "type": "function", "function": {"name": XSS, "arguments": {XSS: XSS}}}]
        and last["content"] == XSS
    )
    assert (result["role"], result["name"], result["tool_call_id"], result["content"]) == ("tool", XSS, "0", XSS)
    assert "token_ids" not in rows[0]


def test_filters_pick_among_episodes_and_tokens_are_the_stored_arrays(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = _lines(
        _export(tmp_path, tmp_path / "a", "trajectories", "--status", "consumed", "--tokens")["trajectories.jsonl"]
    )
    assert [row["row"] for row in rows] == [1, 2]
    assert rows[0]["token_ids"] == [258, 65, 60, 62, 261, 257] and rows[0]["loss_mask"] == [0, 0, 1, 1, 0, 1]
    assert rows[0]["learner_logprobs"] == [0.0, 0.0, -0.5, -0.5, 0.0, -0.5]
    assert rows[0]["rollout_logprobs"][2] == -1.0 and rows[0]["policy_versions"][-1] == 1
    for words, count in ((["--step", "2"], 2), (["--step", "3"], 0), (["--env", "calc"], 4), (["--env", "other"], 0)):
        out = _export(tmp_path, tmp_path / "-".join(words), "trajectories", *words)
        assert len(_lines(out["trajectories.jsonl"])) == count, words


def test_the_table_of_metrics_has_every_number_of_every_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = _export(tmp_path, tmp_path / "out", "metrics")["metrics.csv"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(metric_rows(folder))
    for row, stored in zip(rows, metric_rows(folder), strict=True):
        numbers = {key: value for key, value in stored.items() if isinstance(value, int | float)}
        assert {key: float(row[key]) for key in numbers} == numbers
    assert rows[2]["policy/entropy"] == ""  # null


def test_a_checkpoint_gives_the_same_logits_in_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["policy.init=random"])
    folder = RunFolder.create(tmp_path, "calc", "tiny", name=RUN)
    folder.write_config(resolved_yaml(config))
    model = load_policy_model(config.policy, seed=3)
    for step, seed in ((2, 7), (4, 3)):
        tensors = {"weights": to_numpy_tensors(load_policy_model(config.policy, seed=seed))}
        save_checkpoint(folder.checkpoints, step, tensors=tensors, state={})
    _export(tmp_path, tmp_path / "out", "weights", "--json")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["path"] == str(tmp_path / "out") and told["files"]["weights"]["step"] == 4
    tokens = random_tokens(40) % model.config.vocab_size
    ours = model(tokens, starts_of(40)).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "weights").eval()
    assert (theirs(tokens[None]).logits[0] - ours).abs().max() <= 1e-4
    _export(tmp_path, tmp_path / "older", "weights", "--checkpoint", "2")
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "older" / "weights").eval()
    assert (older(tokens[None]).logits[0] - ours).abs().max() > 1e-2


def test_the_weights_of_a_transformers_run_come_with_their_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "qwen3"
    tokenizer = save_tokenizer(source)
    set_seed(0)
    start = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, vocab_size=len(tokenizer), num_hidden_layers=2))
    start.save_pretrained(source)
    folder = RunFolder.create(tmp_path, "calc", "hf", name=RUN)
    folder.write_config(resolved_yaml(load_config(["policy=hf", f"policy.path={source}"])))
    trained = {name: array + np.float32(0.01) for name, array in to_numpy_tensors(HfModel(start)).items()}
    save_checkpoint(folder.checkpoints, 1, tensors={"weights": trained}, state={})
    out = _export(tmp_path, tmp_path / "out", "weights")["weights"]
    read = AutoModelForCausalLM.from_pretrained(out)
    assert all(np.array_equal(array, trained[name]) for name, array in to_numpy_tensors(HfModel(read)).items())
    assert AutoTokenizer.from_pretrained(out).encode("2 + 3") == tokenizer.encode("2 + 3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metric"], "Did you mean 'metrics'?"),
        (["weights"], "no checkpoint to load"),
        (["weights", "--checkpoint", "5"], "has checkpoints of steps: none"),
        (["metrics"], "is there already"),
    ],
)
def test_what_cannot_be_exported_is_bad_usage_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    make_run(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.csv").write_text("mine")
    assert main(["export", RUN, *words, "--root", str(tmp_path), "-o", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["metrics.csv"] and (out / "metrics.csv").read_text() == "mine"


def test_a_run_that_has_left_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.create(tmp_path, "calc", "tiny", name=RUN)
    assert main(["export", RUN, "--root", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "nothing to export yet" in capsys.readouterr().err and not (tmp_path / "out").exists()
