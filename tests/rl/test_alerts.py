"""Every rule fires for its reason, once per episode of trouble, and clears."""

import json
from pathlib import Path

import pytest

from conf.loading import load_config
from rl.monitor.alerts import RULES, Alerts, active_alerts, rule_names
from rl.monitor.json_lines import read_json_lines
from rl.monitor.monitor import Monitor
from rl.monitor.progress import ProgressLine
from tests.fakes import FakeClock

HEALTHY = {
    "off_policy/lag/max": 2.0, "policy/mismatch_kl/mean": 0.001, "policy/entropy": 0.5, "optim/grad_norm": 1.0,
    "group/frac_mixed": 0.5, "env/error_ratio": 0.0, "tool/calls_mean": 1.0, "tool/offered": 1.0, "time/step": 1.0,
}  # fmt: skip
TROUBLE = {
    "staleness_violation": ({"off_policy/lag/max": 3.0}, 1),
    "mismatch_kl": ({"policy/mismatch_kl/mean": 0.04}, 5),
    "entropy_floor": ({"policy/entropy": 0.001}, 5),
    "grad_spike": ({"optim/grad_norm": 5.1}, 1),
    "zero_variance": ({"group/frac_mixed": 0.0}, 10),
    "env_errors": ({"env/error_ratio": 0.06}, 5),
    "no_tool_calls": ({"tool/calls_mean": 0.0}, 20),
}
"""Rule -> what breaks it, for how many steps. The bound on staleness is 2."""
ALMOST = {
    "staleness_violation": {"off_policy/lag/max": 2.0},
    "mismatch_kl": {"policy/mismatch_kl/mean": 0.03},
    "entropy_floor": {"policy/entropy": 0.005},
    "grad_spike": {"optim/grad_norm": 5.0},
    "zero_variance": {"group/frac_mixed": 0.1},
    "env_errors": {"env/error_ratio": 0.05},
    "no_tool_calls": {"tool/calls_mean": 0.0, "tool/offered": 0.0},
}


def watch(*overrides: str) -> Alerts:
    return Alerts(load_config(["monitor=quiet", "rollout.max_staleness=2", *overrides]), now_s=0.0)


def run(alerts: Alerts, count: int, first: int = 1, **changes) -> list[tuple[int, str, str]]:
    """(step, rule, state) of all alerts of `count` steps a second apart."""
    found = []
    for step in range(first, first + count):
        row = HEALTHY | changes.get("row", {}) | {"step": step}
        found += [(alert.step, alert.rule, alert.state) for alert in alerts.step(row, float(step))]
    return found


def test_every_rule_has_a_case():
    assert set(TROUBLE) == set(ALMOST) == {rule.name for rule in RULES} and len(set(rule_names())) == len(RULES) + 3


@pytest.mark.parametrize("name", TROUBLE)
def test_a_rule_fires_once_after_its_steps_and_clears_once_after_as_many(name):
    trouble, needed = TROUBLE[name]
    alerts = watch()
    assert run(alerts, 15) == []
    assert run(alerts, needed + 7, 101, row=trouble)[:1] == [(100 + needed, name, "raised")]
    assert alerts.active == (name,)
    assert run(alerts, needed + 7, 201) == [(200 + needed, name, "cleared")]
    assert run(alerts, needed + 7, 301, row=trouble)[0] == (300 + needed, name, "raised")  # a new episode of trouble


@pytest.mark.parametrize("name", ALMOST)
def test_a_value_at_the_threshold_does_not_fire(name):
    alerts = watch()
    assert run(alerts, 15) + run(alerts, 40, 101, row=ALMOST[name]) == []


@pytest.mark.parametrize("name", [name for name, (_, needed) in TROUBLE.items() if needed > 1])
def test_a_rule_waits_for_steps_in_a_row(name):
    trouble, needed = TROUBLE[name]
    alerts = watch()
    for start in (0, 100, 200):
        assert run(alerts, needed - 1, start, row=trouble) == []
        assert run(alerts, 1, start + 50) == []


def test_a_value_that_crosses_the_threshold_again_and_again_is_one_episode():
    alerts = watch()
    found = run(alerts, 5, row=TROUBLE["mismatch_kl"][0])
    for start in range(10, 60, 2):
        found += run(alerts, 1, start) + run(alerts, 1, start + 1, row=TROUBLE["mismatch_kl"][0])
    assert found == [(5, "mismatch_kl", "raised")]


def test_a_number_that_is_not_finite_is_trouble_and_a_missing_one_is_nothing():
    alerts = watch()
    assert run(alerts, 5, row={"policy/mismatch_kl/mean": None}) == [(5, "mismatch_kl", "raised")]
    assert watch().step({"step": 1}, 1.0) == []


def test_a_value_a_hundred_times_over_its_threshold_fires_at_once():  # faults F1
    assert run(watch(), 1, row={"policy/mismatch_kl/mean": 3.1}) == [(1, "mismatch_kl", "raised")]
    assert run(watch(), 1, row={"policy/mismatch_kl/mean": 2.9}) == []


def test_a_metric_that_goes_missing_keeps_its_streak():  # faults F1
    alerts, found = watch(), []
    for step in range(1, 8):
        row = HEALTHY | {"step": step, "policy/mismatch_kl/mean": 0.04}
        if step in (3, 4):
            del row["policy/mismatch_kl/mean"]
        found += [(alert.step, alert.rule) for alert in alerts.step(row, float(step))]
    assert found == [(7, "mismatch_kl")]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("mismatch_kl", "mismatch_kl"), ("entropy_floor", "entropy_floor"), ("grad_spike", "grad_spike"),
        ("zero_variance", "zero_variance_steps"), ("env_errors", "env_error_ratio"), ("no_tool_calls", "no_tool_steps"),
    ],
)  # fmt: skip
def test_zero_switches_a_rule_off(name, setting):
    alerts = watch(f"monitor.alerts.{setting}=0")
    assert run(alerts, 15) + run(alerts, 30, 101, row=TROUBLE[name][0]) == []


def test_the_bound_on_staleness_is_in_steps_where_a_step_makes_several_versions():
    alerts = watch("learner.updates_per_step=2", "rollout.groups_per_step=2")
    assert run(alerts, 1, row={"off_policy/lag/max": 4.0}) == []
    assert run(alerts, 1, 2, row={"off_policy/lag/max": 5.0}) == [(2, "staleness_violation", "raised")]


def test_a_silent_worker_is_named_and_its_return_clears_the_alert():
    alerts = watch()
    assert alerts.tick(1.0, {"worker-0": 1.0, "worker-1": 30.0}) == []
    (raised,) = alerts.tick(2.0, {"worker-0": 1.0, "worker-1": 31.0})
    assert (raised.rule, raised.state, raised.value) == ("no_heartbeat", "raised", 31.0) and "worker-1" in raised.text
    assert alerts.tick(3.0, {"worker-0": 1.0, "worker-1": 32.0}) == []
    (cleared,) = alerts.tick(4.0, {"worker-0": 1.0, "worker-1": 0.0})
    assert (cleared.rule, cleared.state) == ("no_heartbeat", "cleared")


def test_a_step_that_does_not_come_is_told_by_the_usual_step_and_cleared_by_the_next():
    alerts = watch()
    assert run(alerts, 20, row={"time/step": 20.0}) == []  # the last at 20 s; 3 x 20 s is the limit
    assert alerts.tick(80.0, {}) == []
    (raised,) = alerts.tick(80.5, {})
    assert (raised.rule, raised.state, raised.threshold) == ("no_step", "raised", 60.0)
    assert run(alerts, 1, 81) == [(81, "no_step", "cleared")]


def healthy_rows(env: str) -> list[dict]:
    """What the rules look at, as a training that went well stored it."""
    stored = json.loads((Path(__file__).parent / "healthy_metrics.json").read_text())
    rows = [dict(zip(stored["columns"], values, strict=True)) for values in stored["runs"][env]]
    return [{key: value for key, value in row.items() if value != "absent"} for row in rows]


@pytest.mark.parametrize("env", ["calculator", "shop_db", "bank"])
def test_a_training_that_went_well_raises_no_alert_though_its_gradients_shrink(env):
    alerts = watch()
    assert [alert.rule for row in healthy_rows(env) for alert in alerts.step(row, float(row["step"]))] == []


def test_a_gradient_many_times_its_median_and_the_clip_raises_an_alert_in_the_same_training():
    alerts, found = watch(), []
    for row in healthy_rows("calculator"):
        spike = {"optim/grad_norm": 6.0} if row["step"] == 90 else {}
        found += [(alert.rule, alert.state, alert.step) for alert in alerts.step(row | spike, float(row["step"]))]
    assert found == [("grad_spike", "raised", 90), ("grad_spike", "cleared", 91)]


def test_without_a_clip_the_median_alone_tells_a_spike():
    alerts = watch("learner.optimizer.grad_clip=0")
    assert run(alerts, 15, row={"optim/grad_norm": 0.1}) == []
    assert run(alerts, 1, 16, row={"optim/grad_norm": 0.6}) == [(16, "grad_spike", "raised")]


def test_short_steps_do_not_make_a_pause_of_seconds_an_alert():
    alerts = watch()
    run(alerts, 20)
    assert alerts.tick(49.0, {}) == [] and alerts.tick(51.0, {})[0].rule == "no_step"


def test_a_run_that_fails_says_so_and_stale_data_by_its_own_name():
    assert watch().run_failed("OSError: disk full")[0].rule == "run_failed"
    assert watch().run_failed("StalenessViolation: group 'a'")[0].rule == "staleness_violation"


class Rows:
    """A sink that keeps what it gets."""

    name, num_dropped, problem = "rows", 0, ""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def write(self, row) -> None:
        self.rows.append(dict(row))

    def close(self, deadline_s: float) -> None: ...


def test_alerts_are_stored_shown_and_sent_and_a_resumed_run_knows_them(tmp_path, capsys):
    config = load_config(["monitor=quiet", "steps=50"])
    sink, clock = Rows(), FakeClock()
    progress = ProgressLine(total_steps=50, max_staleness=2)
    monitor = Monitor(tmp_path, config, sinks=[sink], progress=progress, clock=clock)
    for step in range(1, 6):
        monitor.step(step, step, HEALTHY | {"env/error_ratio": 0.5})
    assert [row["rule"] for row in sink.rows if row["kind"] == "alert"] == ["env_errors"]
    told, verdict, line = capsys.readouterr().out.splitlines()[-3:]
    assert verdict.startswith("environment failing since step 1: ")
    assert told.startswith("alert: env_errors: environments fail 50% of the episodes") and line.endswith("! env_errors")
    monitor.close()
    assert list(active_alerts(read_json_lines(tmp_path / "events.jsonl"))) == ["env_errors"]
    resumed = Monitor(tmp_path, config, sinks=[], clock=clock)
    for step in range(6, 11):
        resumed.step(step, step, HEALTHY)
    resumed.close()
    events = [row for row in read_json_lines(tmp_path / "events.jsonl") if row["kind"] == "alert"]
    assert [(row["rule"], row["state"]) for row in events] == [("env_errors", "raised"), ("env_errors", "cleared")]
    assert active_alerts(events) == {}
