"""Which weights a run begins with."""

from pathlib import Path

import pytest

from conf.loading import load_config
from conf.schema import PolicyConfig
from policy.model.initial import SHIPPED, initial_weights_file
from rl.cli.main import main
from rl.cluster.ray import with_absolute_paths


def test_the_name_of_another_environment_stands_for_its_shipped_warm_start() -> None:
    found = initial_weights_file(PolicyConfig(init="shop_db"), "my_shop")
    assert found == SHIPPED / "tiny_hybrid-shop_db.safetensors"
    config = with_absolute_paths(load_config(["env=calculator", "policy.init=shop_db"]))
    assert initial_weights_file(config.policy, "calculator") == found  # on any node of a cluster


def test_a_folder_of_that_name_is_meant_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shop_db").mkdir()
    Path("shop_db", "model.safetensors").touch()
    assert initial_weights_file(PolicyConfig(init="shop_db"), "my_shop") == Path("shop_db", "model.safetensors")


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (PolicyConfig(init="shop_dbb"), r"'shop_dbb' is no file.*preset='tiny_hybrid' \(bank, calculator, .*shop_db"),
        (PolicyConfig(init="shop_db", preset="tiny_moe"), r"preset='tiny_moe' \(there are none\)"),
        (PolicyConfig(init="shop_db", overrides={"vocab_size": 9}), "no environment with a shipped warm start"),
        (PolicyConfig(init="auto"), r"no shipped warm start .* env 'my_shop': make one with `shoal sft"),
    ],
)
def test_weights_that_do_not_exist_are_refused_with_what_there_is(policy: PolicyConfig, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        initial_weights_file(policy, "my_shop")


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_from_a_name_that_is_none_does_not_start(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "env=calculator", "policy.init=shop_dbb"]) == 2
    assert "policy.init='shop_dbb' is no file" in capsys.readouterr().err
