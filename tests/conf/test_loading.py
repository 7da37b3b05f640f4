"""From the command line to a checked config: what composes, what is refused, and what the refusal says."""

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.checks import CHOICES, CHOICES_OR_IMPORT, FRACTIONS, POSITIVE, RANGES, check_config
from conf.keys import leaf_keys, lookup
from conf.loading import (
    GROUPS,
    ConfigError,
    expand_sweep,
    load_config,
    options_of,
    read_config,
    resolved_yaml,
)
from conf.schema import TrainConfig


def error_of(*argv: str, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(argv, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(config: Any, key: str, value: Any) -> Any:
    """`config` with one dotted key set, unchecked."""
    head, _, rest = key.partition(".")
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


# --- what composes


def test_the_default_yaml_adds_nothing_to_the_schema():
    assert load_config([]) == TrainConfig()


NEEDS = {"policy=hf": "policy.path", "env=custom": "env.id", "monitor=wandb_online": "key"}
if find_spec("vllm") is None:
    NEEDS["engine=vllm"] = "pip install 'shoal[vllm]'"


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options_of(group)])
def test_every_option_of_every_group_composes_or_says_what_it_needs(choice, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    if choice in NEEDS:
        assert NEEDS[choice] in error_of(choice)
    else:
        load_config([choice])


def test_a_group_an_experiment_and_a_key_take_precedence_in_this_order():
    config = load_config(["experiment=smoke", "env=tool_gate", "rollout.group_size=3"])
    assert (config.steps, config.rollout.groups_per_step, config.rollout.group_size) == (3, 2, 3)
    assert (config.env.id, config.monitor.wandb) == ("ToolGate-v0", "disabled")


def test_a_key_that_no_yaml_names_needs_no_plus_and_a_plus_changes_nothing():
    assert load_config(["learner.optimizer.lr=1e-3"]) == load_config(["+learner.optimizer.lr=1e-3"])
    assert load_config(["++learner.optimizer.lr=1e-3"]).learner.optimizer.lr == 1e-3


def test_free_mappings_take_any_key_and_interpolation_finds_defaults():
    config = load_config(["env.kwargs.latency_median_s=0.15", "policy.overrides={a: 1, b: [2]}", "seed=${steps}"])
    assert config.env.kwargs == {"latency_median_s": 0.15}
    assert config.policy.overrides == {"a": 1, "b": [2]}
    assert config.seed == config.steps


@pytest.mark.parametrize(
    ("env_id", "name"),
    [("os:TicTacToe-v2", "tic_tac_toe"), ("json.decoder:My-Env-v0", "my_env"), ("Go9x9-v1", "go9x9")],
)
def test_an_environment_id_on_the_command_line_means_the_custom_group(env_id, name):
    config = load_config([f"env={env_id}", "env.level=3"])
    assert (config.env.id, config.env.name, config.env.level) == (env_id, name, 3)


def test_an_entry_of_a_mix_is_changed_by_name():
    mix = load_config(["env=mix", "env.mix.shop_db.weight=3", "env.mix.my_own.id=os:Mine-v0"]).env.mix
    assert {name: (entry.id, entry.weight) for name, entry in mix.items()} == {
        "calculator": ("Calculator-v0", 2.0),
        "tool_gate": ("ToolGate-v0", 1.0),
        "shop_db": ("ShopDB-v0", 3.0),
        "my_own": ("os:Mine-v0", 1.0),
    }


def test_a_folder_of_the_user_adds_options(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "chess.yaml").write_text("name: chess\nid: os:Chess-v0\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /env: chess\nsteps: 4\n"
    )
    config = load_config(["experiment=mine"], search_paths=[tmp_path])
    assert (config.env.id, config.steps) == ("os:Chess-v0", 4)
    assert "Did you mean 'chess'?" in error_of("env=ches", search_paths=[tmp_path])
    assert "does not exist" in error_of(search_paths=[tmp_path / "nowhere"])


def test_resolved_yaml_is_read_back_unchanged_and_single_keys_of_it_can_change():
    config = load_config(["env=mix", "learner=gspo", "policy.overrides.hidden_size=32", "run.name='007'"])
    text = resolved_yaml(config)
    assert read_config(text) == config
    assert read_config(text, ["steps=7"]) == replace(config, steps=7)
    for words, message in ((["stepz=7"], "steps"), (["env=shop_db"], "group"), (["steps=-1"], "at least 1")):
        with pytest.raises(ConfigError, match=message):
            read_config(text, words)
    with pytest.raises(ConfigError, match=r"unknown key 'learner.publish_evry'"):
        read_config(text.replace("publish_every:", "publish_evry:"))


def test_a_sweep_is_every_combination_in_order():
    assert expand_sweep(["env=shop_db", "seed=1,2", "learner=grpo,gspo"]) == [
        ["env=shop_db", "seed=1", "learner=grpo"],
        ["env=shop_db", "seed=1", "learner=gspo"],
        ["env=shop_db", "seed=2", "learner=grpo"],
        ["env=shop_db", "seed=2", "learner=gspo"],
    ]
    assert expand_sweep(["steps=3"]) == [["steps=3"]]


def test_importing_the_schema_imports_nothing_of_others():
    others = {"hydra", "omegaconf", "pydantic", "yaml", "torch"}
    code = f"import sys, conf.schema, conf.checks; sys.exit(bool({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=Path(__file__).parents[2]).returncode == 0


# --- what is refused

REFUSED = [
    (["rollout.max_stalenes=3"], "unknown key 'rollout.max_stalenes'. Did you mean 'rollout.max_staleness'?"),
    (["+rollout.max_stalenes=3"], "unknown key 'rollout.max_stalenes'. Did you mean 'rollout.max_staleness'?"),
    (["++max_staleness=3"], "unknown key 'max_staleness'. Did you mean 'rollout.max_staleness'?"),
    (["rolout.max_staleness=3"], "unknown key 'rolout.max_staleness'. Did you mean 'rollout.max_staleness'?"),
    (["lr=1e-3"], "unknown key 'lr'. Did you mean 'learner.optimizer.lr'?"),
    (["+foo=1"], "unknown key 'foo'."),
    (["monitor.tensorboard=true"], "unknown key 'monitor.tensorboard'. Write monitor.trackers=[tensorboard] instead"),
    (["monitor.trackers=trackio"], "monitor.trackers must be a list, such as [A, B]"),
    (["monitor.trackers=[tracio]"], "'tracio' is unknown. Did you mean 'trackio'? Allowed: tensorboard, trackio"),
    (["monitor.trackers=[trackio,trackio]"], "monitor.trackers: 'trackio' is there 2 times"),
    (["hydra.run.dir=x"], "unknown key 'hydra.run.dir'."),
    (["seed.x=1"], "unknown key 'seed.x'."),
    (["env=mix", "env.mix.shop_db.wieght=2"], "Did you mean 'env.mix.shop_db.weight'?"),
    (["env=mix", "env.mix.shopdb.weight=2"], "env.mix.shopdb.id is missing"),
    (["env=calcuator"], "unknown env 'calcuator'. Did you mean 'calculator'? Available: api_desk, bank, "),
    (["policy=tiny-moe"], "unknown policy 'tiny-moe'. Did you mean 'tiny_moe'? Available: "),
    (["experiment=smok"], "Did you mean 'smoke'?"),
    (["env=[calculator,mix]"], "unknown env '[calculator,mix]'."),
    (["expermient=smoke"], "Did you mean 'experiment'?"),
    (["seed=abc"], "seed='abc' must be a whole number"),
    (["seed=1.0"], "seed=1.0 must be a whole number"),
    (["seed=true"], "seed=True must be a whole number"),
    (["seed="], "seed='' must be a whole number"),
    (["rollout.temperature=nan"], "rollout.temperature=nan must be a finite number"),
    (["rollout.temperature=hot"], "rollout.temperature='hot' must be a finite number"),
    (["dry_run=1"], "dry_run=1 must be true or false"),
    (["rollout.lock=null"], "rollout.lock=None must be text"),
    (["rollout.lock=[turn]"], "rollout.lock=['turn'] must be text"),
    (["env.kwargs=3"], "env.kwargs=3 must be a mapping"),
    (["learner.loss=gspo"], "learner.loss='gspo' is a section"),
    (["seed=1,2"], "'seed=1,2' lists several values: add -m to run each of them"),
    (["steps"], "'steps' is not key=value"),
    (["~env.id=1"], "keys cannot be deleted"),
    (["seed=${nothing}"], "nothing"),
    (["seed=[1"], "'seed=[1' cannot be read"),
    (["+env._target_=os.system"], "'env._target_' is refused"),
    (["env.kwargs._target_=os.system"], "'env.kwargs._target_' is refused"),
    (["env.kwargs={a: [{_target_: os.system}]}"], "'env.kwargs.a.0._target_' is refused"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_a_user_may_mistype_is_refused_by_name(argv, message):
    assert message in error_of(*argv)


def test_words_that_a_command_does_not_read_are_refused():
    assert "has no effect" in error_of("sft.steps=3", ignored=("sft.",))
    assert "has no effect" in error_of("steps=3", ignored=("steps=",))
    assert load_config(["sft.steps=3"], ignored=("steps=",)).sft.steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: chess\niid: Chess-v0\n", "unknown key 'env.iid'. Did you mean 'env.id'?"),
        ("name: chess\n_target_: os.system\n", "'env._target_' is refused"),
        ("name: [chess\nid: x\n", "chess.yaml"),
        ("name: chess\nid: ???\n", "env.id is missing"),
        ("3\n", "Invalid loaded object type"),
    ],
)
def test_a_bad_yaml_file_of_the_user_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "chess.yaml").write_text(text)
    assert message in error_of("env=chess", search_paths=[tmp_path])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="abseed=.+~,[]{}$:'\"\\ 1_\n\u00e9", max_size=12), max_size=3))
def test_any_words_give_a_config_or_a_config_error(argv):
    try:
        assert isinstance(load_config(argv), TrainConfig)
    except ConfigError as error:
        assert str(error)


# --- values


@pytest.mark.parametrize("key", [*RANGES, *POSITIVE, *FRACTIONS])
def test_every_bound_is_checked_and_named(key):
    whole = isinstance(lookup(TrainConfig(), key), int)
    low, high = RANGES.get(key, (0, 1))
    outside = [low - 1] if key in RANGES else [-0.5] if key in FRACTIONS else [0.0, -1.0]
    if high != float("inf") and key not in POSITIVE:
        outside.append(high + 1)
    for value in outside:
        with pytest.raises(ConfigError, match=rf"{key}=.* is out of range"):
            check_config(changed(TrainConfig(), key, int(value) if whole else float(value)))


def test_every_number_of_the_schema_has_a_bound():
    numbers = {key for key in leaf_keys(TrainConfig()) if type(lookup(TrainConfig(), key)) in (int, float)}
    assert numbers == {*RANGES, *POSITIVE, *FRACTIONS}


@pytest.mark.parametrize("key", [*CHOICES, *CHOICES_OR_IMPORT])
def test_a_word_that_is_no_choice_is_refused_with_the_nearest(key):
    known = (CHOICES | CHOICES_OR_IMPORT)[key][0]
    with pytest.raises(ConfigError, match=rf"{key}=.*Did you mean '{known}'.*Allowed: .*{known}"):
        check_config(changed(TrainConfig(), key, known + "z"))


def test_a_function_of_the_user_is_an_importable_path():
    assert load_config(["learner.loss.name=os.path:join"]).learner.loss.name == "os.path:join"
    assert "no module named 'nowhere'" in error_of("learner.loss.name=nowhere.x:f")
    assert "module:function" in error_of("learner.loss.name=os.path.join")


# --- combinations

IMPOSSIBLE = [
    (["learner.publish_every=4", "rollout.max_staleness=2"], ["learner.publish_every=4", "deadlock", "= 3 steps"]),
    (["rollout=sync", "learner.publish_every=2"], ["learner.publish_every=2", "= 1 steps"]),
    (
        ["learner.updates_per_step=13", "rollout.groups_per_step=12"],
        ["learner.updates_per_step=13", "rollout.groups_per_step=12"],
    ),
    (["engine.max_sessions=4", "engine.max_running=8"], ["engine.max_sessions=4", "engine.max_running=8"]),
    (
        ["rollout.max_turn_tokens=256", "engine.max_model_tokens=256"],
        ["rollout.max_turn_tokens=256", "engine.max_model_tokens=256"],
    ),
    (
        ["learner.micro_batch_tokens=255", "engine.max_model_tokens=256"],
        ["engine.max_model_tokens=256", "learner.micro_batch_tokens=255"],
    ),
    (
        ["cluster.stall_timeout_s=120", "rollout.episode_deadline_s=120"],
        ["cluster.stall_timeout_s=120", "rollout.episode_deadline_s=120"],
    ),
    (["policy=hf"], ["policy.kind=hf needs policy.path"]),
    (["policy=hf", "policy.path=x", "policy.dialect=tiny"], ["policy.dialect=tiny needs policy.kind=hybrid"]),
    (["policy.dialect=chat_template"], ["policy.dialect=chat_template needs policy.kind=hf"]),
    (["policy.dialect=qwen3_5"], ["policy.dialect=qwen3_5 needs policy.kind=hf"]),
    (["policy=hf", "policy.path=x", "policy.preset=tiny_moe"], ["policy.preset='tiny_moe' has no effect"]),
    (["policy=hf", "policy.path=x", "policy.overrides.a=1"], ["policy.overrides={'a': 1} has no effect"]),
    (["policy.path=x"], ["policy.path='x' has no effect"]),
    (["engine.vllm.kv_cache_mib=8"], ["engine.vllm.kv_cache_mib=8 has no effect", "engine.kind=local"]),
    (
        ["engine=vllm", "engine.vllm.extra.speculative_config={method: mtp}"],
        ["engine.vllm.extra.speculative_config", "MTP", "stale", "n-gram lookup"],
    ),
    (["engine=vllm", "engine.vllm.extra.dtype=half"], ["engine.vllm.extra.dtype", "set that one"]),
    (["engine=vllm", "engine.vllm.extra.quantization=fp8"], ["engine.vllm.extra.quantization", "compared"]),
    (["engine=vllm", "engine.vllm.extra.async_scheduling=true"], ["engine.vllm.extra.async_scheduling"]),
    (["engine=vllm", "evaluation.temperature=0.005"], ["evaluation.temperature=0.005", "at least 0.01"]),
    (
        ["engine=vllm", "engine.vllm.transport=files", "cluster=inprocess"],
        ["engine.vllm.transport=files has no effect", "cluster.kind=inprocess"],
    ),
    (
        ["engine=vllm", "engine.vllm.transport=broadcast", "cluster=inprocess"],
        ["engine.vllm.transport=broadcast has no effect", "cluster.kind=inprocess"],
    ),
    (["env=mix", "env.id=ShopDB-v0"], ["env.id='ShopDB-v0' has no effect", "env.mix"]),
    (["env=mix", "env.level=2"], ["env.level=2 has no effect"]),
    (["env=mix", "env.kwargs.a=2"], ["env.kwargs={'a': 2} has no effect"]),
    (["env=mix", "env.mix.shop_db.weight=0"], ["env.mix.shop_db.weight=0.0", "more than 0"]),
    (["env=mix", "env.mix.shop_db.level=10"], ["env.mix.shop_db.level=10", "0 to 9"]),
    (["env=mix", "env.mix.shop_db.id=shop"], ["env.mix.shop_db.id='shop'", "Name-v0"]),
    (["env=custom"], ["env.id is missing"]),
    (["env.id=calculator"], ["env.id='calculator'", "Name-v0"]),
    (["env=nowhere.games:Go-v0"], ["env.id=", "no module named 'nowhere'"]),
    (["env.name='../x'"], ["env.name", "../x"]),
    (["run.name=Run_1"], ["run.name='Run_1'"]),
    (["run.name=latest"], ["run.name='latest'"]),
    (["evaluation.every=0", "evaluation.tasks=5"], ["evaluation.tasks=5 has no effect"]),
    (["cluster=inprocess", "cluster.num_cpus=2"], ["cluster.num_cpus=2 has no effect"]),
    (["cluster=inprocess", "cluster.address=a:1"], ["cluster.address='a:1' has no effect"]),
    (["cluster.address=a:1", "cluster.num_cpus=2"], ["cluster.num_cpus=2 has no effect"]),
    (["monitor.wandb=disabled", "monitor.wandb_project=x"], ["monitor.wandb_project='x' has no effect"]),
    (["run.debug_failpoint=sample"], ["run.debug_failpoint='sample'", "<phase>:<count>"]),
    (["run.debug_failpoint='sleep:1'"], ["reset, sample, tool, commit, swap"]),
    (["run.debug_failpoint='sample:0'"], ["count at least 1"]),
]


@pytest.mark.parametrize(("argv", "parts"), IMPOSSIBLE, ids=[" ".join(argv) for argv, _ in IMPOSSIBLE])
def test_what_cannot_be_meant_is_refused_with_its_reason(argv, parts):
    message = error_of(*argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "argv",
    [
        ["learner.publish_every=3"],
        ["rollout=sync", "rollout.lock=group"],
        ["run.debug_failpoint='swap:2,reset:1'"],
        ["cluster=inprocess", "rollout.group_size=2", "rollout.groups_per_step=1"],
        ["evaluation.every=0"],
    ],
)
def test_the_edge_of_what_is_allowed_is_allowed(argv):
    load_config(argv)


# --- this machine


def test_a_checkpoint_folder_and_weights_must_be_there(tmp_path):
    assert "config.json" in error_of("policy=hf", f"policy.path={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert load_config(["policy=hf", f"policy.path={tmp_path}"]).policy.kind == "hf"
    assert "no such file" in error_of(f"policy.init={tmp_path}/none.safetensors")
    assert read_config(resolved_yaml(changed(TrainConfig(), "policy.init", "gone.safetensors")))  # a run is still shown


def test_wandb_online_needs_a_key_and_says_how_to_give_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "wandb login" in error_of("monitor=wandb_online")
    (tmp_path / ".netrc").write_text("machine example.org login a password b\n")
    assert "wandb login" in error_of("monitor=wandb_online")
    (tmp_path / ".netrc").write_text("machine api.wandb.example login a password b\n")
    assert load_config(["monitor=wandb_online"]).monitor.wandb == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert load_config(["monitor=wandb_online"]).monitor.wandb == "online"


# --- the schema itself


def sections(kind: type) -> list[type]:
    found = [kind]
    for item in fields(kind):
        default = item.default_factory() if callable(item.default_factory) else item.default
        if is_dataclass(default):
            found += sections(type(default))
    return found


def test_every_section_is_frozen_slotted_and_small():
    every = sections(TrainConfig)
    for section in every:
        assert section.__dataclass_params__.frozen and "__slots__" in vars(section), section  # type: ignore[attr-defined]
        assert len(fields(section)) <= 15, section
    assert sum(len(fields(section)) for section in every) <= 151


def test_a_pace_belongs_to_an_environment_of_the_run_and_is_positive() -> None:
    config = load_config(["env=mix", "env.steps_per_second.shop_db=5"])
    assert config.env.steps_per_second == {"shop_db": 5}
    with pytest.raises(ConfigError, match="no environment is named 'shop'; there is calculator, tool_gate, shop_db"):
        load_config(["env=mix", "env.steps_per_second.shop=5"])
    with pytest.raises(ConfigError, match=r"steps_per_second\.calculator=0\.0 is out of range"):
        load_config(["env.steps_per_second.calculator=0"])
