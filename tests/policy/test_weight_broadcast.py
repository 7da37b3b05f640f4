"""Snapshots that an engine's ranks pull from the learner: real processes, gloo between them, NCCL where GPUs are."""

import json
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from policy.sync.weight_broadcast import CHUNK_BYTES, CPU, Line, joined, receive
from policy.sync.weight_offer import OfferedSnapshot
from policy.sync.weight_sender import WeightSender
from tests.policy.weight_pulls import HOST, die_after_a_chunk, hold_a_snapshot, import_torch, pull, small, told

SPAWN = multiprocessing.get_context("spawn")
LARGE = CHUNK_BYTES // 4 + 5
"""Of float32: more than a chunk."""
TENSORS = {
    "a": np.array(4.5, np.float32),
    "b.transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "c.large": np.arange(LARGE, dtype=np.float32),
    "d.empty": np.zeros((0, 2), np.float32),
    "e.half": np.arange(7, dtype=np.float16),
    "f.every.second": np.arange(10, dtype=np.float64)[::2],
}


@pytest.fixture
def sender() -> Iterator[WeightSender]:
    sender = WeightSender(HOST, keep=2, deadline_s=60)
    yield sender
    sender.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two, which have imported torch before a deadline runs."""
    with ProcessPoolExecutor(2, mp_context=SPAWN, initializer=import_torch) as pool:
        for started in [pool.submit(time.sleep, 0.5) for _ in range(2)]:
            started.result(100)
        yield pool


def test_both_ranks_of_an_engine_hold_every_tensor_as_it_was(
    sender: WeightSender, processes: ProcessPoolExecutor
) -> None:
    snapshot = PolicySnapshot.create(3, TENSORS)
    offer = sender.offer(snapshot)
    pulls = [processes.submit(pull, offer, "one", rank, 2) for rank in (0, 1)]
    wanted = {name: told(array) for name, array in TENSORS.items()}
    assert [each.result(80) for each in pulls] == [(snapshot.digest, wanted)] * 2


@pytest.mark.slow
def test_an_engine_that_hangs_in_a_transfer_delays_no_other_and_is_given_up_at_the_deadline(
    processes: ProcessPoolExecutor,
) -> None:
    sender = WeightSender(HOST, keep=2, deadline_s=6)
    offers = [sender.offer(small(version)) for version in (1, 2)]
    until = time.monotonic() + 60
    with joined(offers[0], transfer="hangs", rank=0, ranks=1, device=CPU, until=until) as (line, _):
        asked = time.monotonic()
        pulls = [processes.submit(pull, offer, f"engine-{i}", 0, 1) for i, offer in enumerate(offers)]
        assert [each.result(30)[0] for each in pulls] == [small(1).digest, small(2).digest]
        assert time.monotonic() - asked < 5
        assert "error" in line.hear(until)
        assert time.monotonic() - asked < 15
    sender.close()


def test_a_version_that_is_no_longer_held_is_refused_with_those_that_are(sender: WeightSender) -> None:
    first, *_ = [sender.offer(small(version)) for version in (1, 2, 3)]
    with pytest.raises(WeightSyncError, match="version 1 is not held any more; versions held: 2, 3"):
        receive(first, transfer="a", rank=0, ranks=1)


def test_a_version_offered_again_after_a_return_to_a_checkpoint_is_the_new_one(sender: WeightSender) -> None:
    for version in (4, 5):
        sender.offer(small(version))
    other = PolicySnapshot.create(4, {"a": np.full((3, 2), 9, np.float32)})
    assert receive(sender.offer(other), transfer="a", rank=0, ranks=1).tensors["a"].tolist() == [[9, 9]] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token": "guessed"}, "token"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"transfer": 7}, "transfer 7"),
        ({"version": [1]}, "unhashable"),
        ({"ranks": "2"}, "not supported"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_next_one_served(
    sender: WeightSender, changed: dict[str, object], message: str
) -> None:
    offer, until = sender.offer(small(1)), time.monotonic() + 20
    request = {"version": 1, "transfer": "a", "rank": 0, "ranks": 2, "token": offer.token, "gpu": ""}
    with socket.create_connection((offer.host, offer.port), timeout=20) as connection:
        line = Line(connection)
        line.say(request | changed, until)
        assert message in line.hear(until)["error"]
    with socket.create_connection((offer.host, offer.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\n")
        assert "error" in Line(connection).hear(until)
    assert receive(offer, transfer="a", rank=0, ranks=1).digest == small(1).digest


def test_bytes_that_changed_on_the_way_are_refused_by_the_name_of_their_tensor(sender: WeightSender) -> None:
    good = small(1)
    offer = sender.offer(PolicySnapshot(version=1, manifest=good.manifest, tensors={"a": good.tensors["a"] + 1}))
    with pytest.raises(WeightSyncError, match="'a' does not match its digest"):
        receive(offer, transfer="a", rank=0, ranks=1)


def wait_for_log(caplog: pytest.LogCaptureFixture, text: str, within_s: float) -> None:
    until = time.monotonic() + within_s
    while text not in caplog.text:
        assert time.monotonic() < until, caplog.text
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_killed_in_a_transfer_costs_that_one_alone(
    sender: WeightSender, caplog: pytest.LogCaptureFixture
) -> None:
    offer = sender.offer(PolicySnapshot.create(3, {"a": np.zeros(3 * LARGE, np.float32)}))
    process = SPAWN.Process(target=die_after_a_chunk, args=(offer, "cpu"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    wait_for_log(caplog, "version 3 did not arrive", within_s=15)  # noticed, not waited for until the deadline
    assert receive(sender.offer(small(4)), transfer="next", rank=0, ranks=1).digest == small(4).digest
    assert threads_of_transfers() == 0


def threads_of_transfers() -> int:
    """Soon: an ending thread is listed for a moment."""
    until = time.monotonic() + 5
    while found := sum(thread.name == "weight-transfer" for thread in threading.enumerate()):
        if time.monotonic() > until:
            return found
        time.sleep(0.05)
    return 0


@pytest.mark.slow
def test_a_sender_that_is_killed_is_a_weight_sync_error_of_whoever_waits_and_of_whoever_comes() -> None:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=hold_a_snapshot, args=(there,))
    process.start()
    assert here.poll(60)
    offer = here.recv()
    errors: list[str] = []

    def wait_for_the_other_rank() -> None:
        with pytest.raises(WeightSyncError) as caught:
            receive(offer, transfer="a", rank=0, ranks=2)
        errors.append(str(caught.value))

    waiting = threading.Thread(target=wait_for_the_other_rank)
    waiting.start()
    time.sleep(0.3)
    process.kill()
    waiting.join(20)
    assert len(errors) == 1 and "the transfer broke off" in errors[0]
    with pytest.raises(WeightSyncError, match=r"version 1 could not be received .* refused"):
        receive(offer, transfer="b", rank=0, ranks=1)


def test_a_sender_that_says_nothing_is_a_weight_sync_error_at_the_deadline() -> None:
    with socket.create_server((HOST, 0)) as silent:
        offer = OfferedSnapshot(
            version=1, manifest=(), host=HOST, port=silent.getsockname()[1], token="", deadline_s=0.5
        )
        began = time.monotonic()
        with pytest.raises(WeightSyncError, match=r"longer than 0\.5 s"):
            receive(offer, transfer="a", rank=0, ranks=1)
        assert 0.4 < time.monotonic() - began < 5


def test_an_offer_passes_through_messages_of_plain_values_and_its_token_through_no_log(sender: WeightSender) -> None:
    offer = sender.offer(PolicySnapshot.create(3, {"a": TENSORS["a"], "b": TENSORS["b.transposed"]}))
    assert OfferedSnapshot.from_wire(json.loads(json.dumps(offer.to_wire()))) == offer
    assert offer.token not in repr(offer)
    offer.verify({"a": ((), "float32"), "b": ((3, 2), "float32")})
    with pytest.raises(WeightSyncError, match=r"version 3: 'b' has shape \(3, 2\), expected \(2, 3\)"):
        offer.verify({"a": ((), "float32"), "b": ((2, 3), "float32")})


# --- on real GPUs ---


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_between_gpus_of_their_own_weights_go_by_nccl_and_a_killed_rank_costs_one_transfer(
    processes: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sender = WeightSender(HOST, keep=2, device=torch.device("cuda", 0), deadline_s=60)
    snapshot = PolicySnapshot.create(3, TENSORS)
    wanted = {name: told(array) for name, array in TENSORS.items()}
    assert processes.submit(pull, sender.offer(snapshot), "a", 0, 1, "cuda:1").result(90) == (snapshot.digest, wanted)
    assert "1 ranks, nccl" in caplog.text
    offer = sender.offer(PolicySnapshot.create(4, {"a": np.zeros(3 * LARGE, np.float32)}))
    process = SPAWN.Process(target=die_after_a_chunk, args=(offer, "cuda:1"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    wait_for_log(caplog, "version 4 did not arrive", within_s=70)
    assert processes.submit(pull, sender.offer(snapshot), "b", 0, 1, "cuda:1").result(90) == (snapshot.digest, wanted)
    sender.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
def test_two_processes_on_one_gpu_which_nccl_refuses_go_by_gloo(
    processes: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sender = WeightSender(HOST, keep=2, device=torch.device("cuda", 0), deadline_s=60)
    assert processes.submit(pull, sender.offer(small(1)), "a", 0, 1, "cuda:0").result(90)[0] == small(1).digest
    assert "1 ranks, gloo" in caplog.text
    sender.close()
