"""A Ray of the run's own, or the one named: started with token auth, nothing sent anywhere."""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

from conf.schema import TrainConfig
from rl.cluster.placement import plan
from rl.cluster.protocol import ClusterError

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory for weights and groups on one machine; what does not fit goes to disk."""


def start_ray(config: TrainConfig, namespace: str) -> None:
    """Start a private Ray (or join the one named), dashboard off, token auth on, nothing sent anywhere.

    `address="local"` because a bare init would join any cluster that happens to run on this machine. The token lives in
    this process and its children only: Ray listens on every interface, and its own token file is readable by others.
    """
    _check_address(config.cluster.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a run wherever anything else is busy
    if config.cluster.address == "local" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if "ray" not in sys.modules:  # read once, when Ray is imported; later on init turns it on itself
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    options: dict[str, Any] = {}
    if config.cluster.address == "local":
        cores = config.cluster.num_cpus or ceil(plan(config).cpus) + 1
        options = {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES}
    with _without_variables(config.env.secrets):
        ray.init(
            address=config.cluster.address,
            namespace=namespace,  # names of actors are the run's own
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )


def _check_address(address: str) -> None:
    """Raise `ClusterError` where nothing listens at IP:port: Ray itself would keep asking for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "//" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        why = f"no Ray head answers there ({error}); `ray start --head` prints its address"
        raise ClusterError(f"cluster.address={address}: {why}") from None


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """Processes that start meanwhile do not get these variables: a private Ray hands its own on to every actor."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
