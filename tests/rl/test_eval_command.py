"""`shoal eval`: any checkpoint of a run, all of them, and two against each other on the same tasks."""

import json
from pathlib import Path

import pytest

from rl.cli.main import main
from rl.monitor.paired import mcnemar
from tests.rl.training import SMALL


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps with a checkpoint of each."""
    root = tmp_path_factory.mktemp("eval") / "runs"
    words = ["env=tool_gate", "steps=2", "rollout.max_turn_tokens=4", f"run.root={root}", "run.name=short"]
    assert main(["train", *SMALL, *words, "run.checkpoint_every=1"]) == 0
    return root


def told(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", "short", "--root", str(root), *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_checkpoint_is_evaluated_by_its_step_and_all_from_old_to_new(root, capsys):  # faults F6
    _, out, _ = told(capsys, root, "--checkpoint", "1", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["step"], facts["policy_version"], facts["n"], facts["paired"]) == (1, 1, 4, None)
    code, out, _ = told(capsys, root, "--checkpoint", "all")
    found = [line.split("step ")[1].split(",")[0] for line in out.splitlines() if "held-out success" in line]
    assert code == 0 and found == ["1", "2"]


def test_two_checkpoints_are_compared_on_the_same_tasks(root, capsys):  # faults F6
    _, out, _ = told(capsys, root, "--against", "1", "--json", "evaluation.final_tasks=6")
    facts = json.loads(out.splitlines()[-1])
    paired, (old, new) = facts["paired"], facts["evaluations"]
    assert (facts["step"], old["step"], new["step"], paired["n"]) == (2, 1, 2, 6)
    assert paired["difference"] == pytest.approx(new["success"] - old["success"])
    assert paired["p_value"] == mcnemar(paired["only_a"], paired["only_b"])
    _, out, _ = told(capsys, root, "--against", "1")
    assert "step 2 against step 1: success differs by" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "7"], "--checkpoint 7: short has no such checkpoint. There are: 1, 2"),
        (["--against", "x"], "--against x: short has no such checkpoint. There are: 1, 2"),
        (["--against", "2"], "that is the checkpoint itself"),
        (["--checkpoint", "all", "--against", "1"], "--checkpoint N, not all"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(root, capsys, words, message):  # faults F6
    code, _, err = told(capsys, root, *words)
    assert code == 2 and message in err
