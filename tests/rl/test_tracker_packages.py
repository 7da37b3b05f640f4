"""A tracker without its package is refused before anything starts."""

import sys

import pytest

from conf.keys import ConfigError
from conf.loading import load_config
from rl.loop.preflight import check_parts
from rl.monitor.tracker_packages import check_trackers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["monitor.trackers=[tensorboard]"],
         "monitor.trackers=[tensorboard] needs tensorboardX, which is not installed: pip install 'shoal[tensorboard]'"),
        (["monitor.trackers=[trackio]"], "monitor.trackers=[trackio] needs trackio"),
        (["monitor.prometheus_port=9400"], "monitor.prometheus_port=9400 needs prometheus_client"),
        (["monitor.wandb=offline"], "monitor.wandb=offline needs wandb, which is not installed: pip install wandb"),
    ],
)  # fmt: skip
def test_a_tracker_without_its_package_is_refused_with_the_command_that_installs_it(words, message):  # faults F4
    monitor = load_config(["monitor=quiet", *words]).monitor
    with pytest.raises(ConfigError) as caught:
        check_trackers(monitor, is_installed=lambda module: False)
    assert message in str(caught.value)
    check_trackers(monitor, is_installed=lambda module: True)


def test_a_run_without_trackers_needs_none_of_their_packages():  # faults F4
    check_trackers(load_config(["monitor=quiet"]).monitor, is_installed=lambda module: False)


def test_it_is_asked_before_a_run_starts(monkeypatch):  # faults F4
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="needs tensorboardX"):
        check_parts(load_config(["monitor=quiet", "monitor.trackers=[tensorboard]"]))
