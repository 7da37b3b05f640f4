"""`shoal doctor --engine`: real episodes of an engine, scored by the learner that would train on them."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from conf.loading import load_config
from policy.vllm.packages import vllm_build
from rl.cli.doctor.consistency import Gap, Report, compare, measure, report_text, sample, updated
from rl.cli.main import main
from rl.cluster.learner_service import build_learner

JUDGED = ["first weights", "first weights, prefix cache", "after an update"]
LOCAL = ("cluster=inprocess", "policy=tiny_hybrid")


def report_of(*overrides: str) -> Report:
    return asyncio.run(measure(load_config([*LOCAL, *overrides]), policy="tiny_hybrid", episodes=6))


def test_the_local_engine_gives_the_learners_logprobs_before_and_after_an_update() -> None:
    report = report_of()
    assert [gap.name for gap in report.gaps] == ["first weights", "after an update"]
    assert report.ok and report.turns >= 1 and all(gap.tokens > 20 and gap.max <= 1e-4 for gap in report.gaps)
    assert "within the bound of 0.001: training starts" in report_text(report)


def test_routes_are_compared_replayed_and_not() -> None:
    report = asyncio.run(
        measure(load_config(["cluster=inprocess", "policy=tiny_moe", "policy.init=random"]), episodes=4)
    )
    assert [gap.name.split(", ")[-1] for gap in report.gaps] == ["routes replayed", "routes not replayed"] * 2
    assert [gap.judged for gap in report.gaps] == [True, False] * 2 and report.ok
    assert "rows without a verdict are for comparison" in report_text(report)
    assert "without a verdict" not in report_text(replace(report, gaps=report.gaps[::2]))
    assert "prefix cache is on in every row" not in report_text(report)


def test_on_gpus_it_is_said_that_routes_come_with_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.cli.doctor.consistency.vllm_build", lambda: "gpu")
    row = Gap(name="first weights, routes replayed", mean=0.001, max=0.01, tokens=9, judged=True)
    report = Report(engine="vllm", policy="tiny_moe", episodes=1, turns=1.0, bound=0.5, gaps=(row,))
    assert "prefix cache is on in every row" in report_text(report)
    assert "prefix cache is on" not in report_text(replace(report, engine="local"))
    assert "prefix cache is on" not in report_text(replace(report, gaps=(replace(row, name="first weights"),)))


def test_an_engine_that_did_not_take_the_update_is_far_beyond_the_bound() -> None:
    config = load_config([*LOCAL])
    learner = build_learner(config)
    stale = updated(learner.snapshot())
    (played,) = asyncio.run(sample(config, (stale,), 4))
    (gap,) = compare(learner, "stale", played)
    assert gap.max > 10 * learner.tolerance


def test_a_gap_beyond_the_bound_ends_with_3_and_names_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine", "local", "learner.self_check_tolerance=1e-12"]) == 3
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "beyond the bound of 1e-12" in shown and "learner.self_check_tolerance" in shown


@pytest.mark.parametrize(("cached_tokens", "said"), [(512, "ok, 512 prompt"), (0, "ok, no prompt"), (None, "ok\n")])
def test_the_report_says_how_much_of_a_prefix_cache_was_used(cached_tokens: int | None, said: str) -> None:
    gap = Gap(name="x", mean=0.0, max=0.0, tokens=9, judged=True, cached_tokens=cached_tokens)
    report = Report(engine="vllm", policy="p", episodes=1, turns=1.0, bound=0.5, gaps=(gap,))
    assert said in report_text(report)


def test_settings_without_an_engine_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "env=shop_db"]) == 2
    assert "'env=shop_db': settings are for the comparison of --engine" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra")
@pytest.mark.parametrize(("policy", "more"), [("tiny_hybrid", []), ("tiny_moe", ["policy.init=random"])])
def test_vllm_is_compared_with_a_prefix_cache_and_after_an_update(
    policy: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--engine", "vllm", "--policy", policy, "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    judged = [gap for gap in report["gaps"] if gap["judged"]]
    assert report["ok"] and [gap["name"].split(", routes")[0] for gap in judged] == JUDGED
    assert all(gap["mean"] <= 0.01 and gap["tokens"] > 100 for gap in judged)
    assert [bool(gap["cached_tokens"]) for gap in judged] == [False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
@pytest.mark.parametrize(
    "engine",
    ["local", pytest.param("vllm", marks=pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra"))],
)
@pytest.mark.parametrize(("policy", "init"), [("tiny_hybrid", "auto"), ("tiny_moe", "random")])
def test_on_a_gpu_an_engine_is_within_the_learners_bound(engine: str, policy: str, init: str) -> None:
    words = [f"engine={engine}", f"policy={policy}", f"policy.init={init}", "cluster=inprocess"]
    config = load_config([*words, "cluster.learner_gpus=1", "cluster.worker_gpus=1"])
    report = asyncio.run(measure(config, policy=policy))
    assert report.ok, report_text(report)
