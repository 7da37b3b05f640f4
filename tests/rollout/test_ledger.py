"""Exactly-once accounting: every state change, the conservation law, crashes and resume."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from envs.task import Task
from rollout.record.ledger import GroupState, Ledger, LedgerError, Rewind, read_audit
from tests.fakes import FakeClock

DIGEST = "ab" * 32


def task(number: int) -> Task:
    return Task(
        task_id=f"train/calculator/{number}",
        env_id="Calculator-v0",
        env_name="calculator",
        seed=2**70 + number,
        level=2,
        kwargs={"latency": 0.25, "tools": ["add", "sub"]},
    )


def issued(path: Path, count: int) -> tuple[Ledger, list[str]]:
    ledger = Ledger(path)
    tasks = [task(number) for number in range(count)]
    ledger.issue(tasks)
    return ledger, [t.task_id for t in tasks]


def committed(path: Path, count: int) -> tuple[Ledger, list[str]]:
    ledger, ids = issued(path, count)
    for group_id in ids:
        assert ledger.commit(group_id, ledger.lease(group_id, "worker-0", 10.0), DIGEST)
    return ledger, ids


def test_a_group_goes_through_its_states_once(tmp_path: Path) -> None:
    ledger, ids = issued(tmp_path / "l", 3)
    attempt = ledger.lease(ids[0], "worker-0", 10.0)
    assert attempt == ledger.attempts(ids[0]) == 1
    assert ledger.commit(ids[0], attempt, DIGEST)
    assert ledger.digest(ids[0]) == DIGEST
    ledger.consume([ids[0]], step=4)
    ledger.lease(ids[1], "worker-1", 10.0)
    ledger.drop(ids[1], "deadline")
    assert ledger.audit() == {
        "issued": 3,
        "queued": 1,
        "leased": 0,
        "committed": 0,
        "consumed": 1,
        "dropped": {"deadline": 1},
        "balanced": True,
        "redispatched": 0,
        "refused_commits": 0,
    }


def test_tasks_come_back_equal_and_in_the_order_they_were_issued(tmp_path: Path) -> None:
    ledger, _ = issued(tmp_path / "l", 12)
    assert ledger.tasks_in("queued") == [task(number) for number in range(12)]
    assert ledger.tasks_in(GroupState.LEASED) == []
    assert ledger.last_issued() == task(11)


def test_a_second_commit_is_refused_and_counted(tmp_path: Path) -> None:
    ledger, ids = issued(tmp_path / "l", 1)
    attempt = ledger.lease(ids[0], "worker-0", 10.0)
    assert [ledger.commit(ids[0], attempt, DIGEST) for _ in range(3)] == [True, False, False]
    assert (ledger.audit()["committed"], ledger.audit()["refused_commits"]) == (1, 2)


def test_a_late_commit_of_a_released_attempt_cannot_settle_the_new_one(tmp_path: Path) -> None:
    ledger, ids = issued(tmp_path / "l", 1)
    first = ledger.lease(ids[0], "worker-0", 10.0)
    assert ledger.release(ids[0], first, "worker lost")
    assert not ledger.commit(ids[0], first, DIGEST)  # while nobody holds it
    second = ledger.lease(ids[0], "worker-1", 10.0)
    assert (first, second) == (1, 2)
    assert not ledger.commit(ids[0], first, DIGEST)  # while the second attempt holds it
    assert not ledger.release(ids[0], first, "late")
    assert ledger.commit(ids[0], second, DIGEST)
    audit = ledger.audit()
    assert (audit["redispatched"], audit["refused_commits"], audit["balanced"]) == (1, 2, True)


def test_commits_after_the_end_are_refused(tmp_path: Path) -> None:
    ledger, ids = issued(tmp_path / "l", 2)
    attempts = [ledger.lease(group_id, "worker-0", 10.0) for group_id in ids]
    ledger.drop(ids[0], "deadline")
    ledger.commit(ids[1], attempts[1], DIGEST)
    ledger.consume([ids[1]], step=0)
    assert not any(ledger.commit(group_id, 1, DIGEST) for group_id in ids)
    assert ledger.audit()["refused_commits"] == 2


def test_changes_a_state_does_not_allow_raise_and_change_nothing(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 2)
    ledger.consume([ids[0]], step=0)
    before = ledger.audit()
    for change, message in [
        (lambda: ledger.consume([ids[0]], 1), "is consumed, so it cannot become consumed"),
        (lambda: ledger.drop(ids[0], "late"), "is consumed, so it cannot become dropped"),
        (lambda: ledger.lease(ids[1], "w", 1.0), "is committed, so it cannot become leased"),
        (lambda: ledger.lease("nobody", "w", 1.0), "'nobody' was never issued"),
        (lambda: ledger.commit("nobody", 1, DIGEST), "'nobody' was never issued"),
        (lambda: ledger.issue([task(7), task(0)]), "'train/calculator/0' was issued before"),
    ]:
        with pytest.raises(LedgerError, match=message):
            change()
    assert ledger.audit() == before


def test_consuming_is_all_or_nothing(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 3)
    ledger.issue([task(99)])
    with pytest.raises(LedgerError, match="is queued"):
        ledger.consume([*ids, task(99).task_id], step=1)
    assert ledger.audit()["committed"] == 3


def test_a_batch_is_one_transaction_and_an_inner_failure_undoes_only_itself(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 3)
    with ledger.batch():
        ledger.drop(ids[0], "degenerate")
        with pytest.raises(LedgerError):
            ledger.consume([ids[1], "nobody"], step=1)
        ledger.drop(ids[2], "degenerate")
        assert read_audit(tmp_path / "l")["dropped"] == {}  # others see it when it is whole
    assert ledger.audit() == read_audit(tmp_path / "l")
    assert (ledger.audit()["committed"], ledger.audit()["dropped"]) == (1, {"degenerate": 2})
    with pytest.raises(ZeroDivisionError), ledger.batch():
        ledger.consume([ids[1]], step=1)
        _ = 1 / 0
    assert (ledger.audit()["committed"], ledger.audit()["balanced"]) == (1, True)


def test_leases_expire_on_the_clock_given(tmp_path: Path) -> None:
    clock = FakeClock()
    ledger = Ledger(tmp_path / "l", clock=clock)
    ledger.issue([task(0), task(1)])
    ledger.lease(task(0).task_id, "worker-0", 10.0)
    ledger.lease(task(1).task_id, "worker-0", 20.0)
    clock.advance(10.0)
    assert ledger.expired() == []
    clock.advance(1.0)
    assert ledger.expired() == [(task(0).task_id, 1)]


def test_rewind_brings_back_what_a_checkpoint_does_not_know(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 6)
    for step, group_id in enumerate(ids[:4], start=1):
        ledger.consume([group_id], step)
    ledger.drop(ids[4], "degenerate")
    ledger.issue([task(10), task(11)])
    ledger.lease(task(10).task_id, "worker-0", 10.0)
    ledger.close()

    ledger = Ledger(tmp_path / "l")
    assert ledger.rewind(2) == Rewind(recommitted=2, requeued=1)
    assert [t.task_id for t in ledger.tasks_in("committed")] == [ids[2], ids[3], ids[5]]
    assert [t.task_id for t in ledger.tasks_in("queued")] == [task(10).task_id, task(11).task_id]
    audit = ledger.audit()
    assert (audit["consumed"], audit["dropped"], audit["balanced"]) == (2, {"degenerate": 1}, True)
    assert not ledger.commit(task(10).task_id, 1, DIGEST)  # the dead process's attempt
    assert ledger.lease(task(10).task_id, "worker-0", 10.0) == 2
    ledger.consume([ids[2]], step=3)


def test_a_committed_group_whose_content_is_lost_can_be_queued_again(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 1)
    ledger.requeue(ids[0], "trajectories lost")
    assert ledger.digest(ids[0]) is None
    assert ledger.lease(ids[0], "worker-0", 10.0) == 2
    assert ledger.audit()["redispatched"] == 1


def test_only_one_writer_at_a_time_and_readers_beside_it(tmp_path: Path) -> None:
    ledger, _ = issued(tmp_path / "l", 2)
    with pytest.raises(LedgerError, match="written by another process"):
        Ledger(tmp_path / "l")
    assert read_audit(tmp_path / "l")["queued"] == 2
    ledger.close()
    Ledger(tmp_path / "l").close()


def test_audit_notices_rows_lost_or_changed_behind_its_back(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 3)
    ledger.close()
    with sqlite3.connect(tmp_path / "l") as db:
        db.execute("DELETE FROM groups WHERE group_id = ?", (ids[0],))
    assert not read_audit(tmp_path / "l")["balanced"]
    with sqlite3.connect(tmp_path / "l") as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE groups SET state = 'consumed' WHERE group_id = ?", (ids[1],))  # without a step


def test_missing_and_broken_ledgers_are_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no ledger at .*nowhere"):
        read_audit(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(LedgerError, match=r"cannot open the ledger .*text"):
        Ledger(tmp_path / "text")
    with pytest.raises(LedgerError, match=r"cannot read the ledger .*text"):
        read_audit(tmp_path / "text")
    with pytest.raises(LedgerError, match="cannot open the ledger"):
        Ledger(tmp_path / "no-such-folder" / "l")


def test_a_full_disk_raises_and_leaves_the_counts_true(tmp_path: Path) -> None:
    ledger, ids = issued(tmp_path / "l", 4)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match="full"):
        ledger.issue([task(number) for number in range(100, 400)])
    assert ledger.audit()["queued"] == 4 and ledger.audit()["balanced"]
    assert ledger.lease(ids[0], "worker-0", 1.0) == 1


def test_random_changes_keep_the_conservation_law_against_a_plain_model(tmp_path: Path) -> None:
    rng = random.Random(0)
    ledger = Ledger(tmp_path / "l")
    model: dict[str, str] = {}
    attempts: Counter[str] = Counter()
    ledger._db.execute("PRAGMA synchronous=OFF")  # the law, not the disk, is under test
    for number in range(1500):
        if not model or rng.random() < 0.2:
            ledger.issue([task(number)])
            model[task(number).task_id] = "queued"
            continue
        group_id = rng.choice(list(model))
        action = rng.choice(["lease", "commit", "release", "consume", "drop"])
        attempt = attempts[group_id] - (rng.random() < 0.2)
        allowed = {"lease": ["queued"], "consume": ["committed"], "drop": ["queued", "leased", "committed"]}
        try:
            if action == "lease":
                attempts[group_id] = ledger.lease(group_id, "w", 1.0)
                result = "leased"
            elif action == "commit":
                good = ledger.commit(group_id, attempt, DIGEST)
                assert good == (model[group_id] == "leased" and attempt == attempts[group_id])
                result = "committed" if good else model[group_id]
            elif action == "release":
                good = ledger.release(group_id, attempt, "lost")
                assert good == (model[group_id] == "leased" and attempt == attempts[group_id])
                result = "queued" if good else model[group_id]
            elif action == "consume":
                ledger.consume([group_id], number)
                result = "consumed"
            else:
                ledger.drop(group_id, "whim")
                result = "dropped"
        except LedgerError:
            assert model[group_id] not in allowed[action]
            continue
        assert model[group_id] in allowed.get(action, [model[group_id]])
        model[group_id] = result
    audit, expected = ledger.audit(), Counter(model.values())
    assert audit["balanced"] and audit["issued"] == len(model)
    assert {state: audit[state] for state in ("queued", "leased", "committed", "consumed")} == {
        state: expected[state] for state in ("queued", "leased", "committed", "consumed")
    }
    assert audit["dropped"] == {"whim": expected["dropped"]}


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from rollout.record.ledger import Ledger
from envs.task import Task
ledger = Ledger(sys.argv[1])
ledger.rewind(10**9)
last = ledger.last_issued()
number = int(last.task_id) + 1 if last else 0
while True:
    ids = [str(number + i) for i in range(3)]
    number += 3
    ledger.issue([Task(task_id=i, env_id="E", env_name="e", seed=0) for i in ids])
    attempts = [ledger.lease(i, "w", 9.0) for i in ids]
    for i, attempt in zip(ids, attempts):
        assert ledger.commit(i, attempt, "d")
    ledger.consume(ids, number)
    print(number, flush=True)
"""


def test_sigkill_at_random_moments_never_unbalances_the_ledger(tmp_path: Path) -> None:
    rng = random.Random(1)
    told = 0
    for kills in range(1, 5):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "l"), str(Path(__file__).parents[2])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        told += 3 * (1 + len(process.communicate(timeout=30)[0].split()))
        audit = read_audit(tmp_path / "l")
        assert audit["balanced"]
        assert told <= audit["consumed"] <= told + 3 * kills  # a kill may fall between consume and print


def test_a_learner_step_of_bookkeeping_costs_under_ten_milliseconds_without_fsync(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger._db.execute("PRAGMA synchronous=OFF")
    seconds = []
    for step in range(10):
        tasks = [task(step * 12 + i) for i in range(12)]
        start = time.process_time()
        ledger.issue(tasks)
        attempts = [ledger.lease(t.task_id, "w", 10.0) for t in tasks]
        for t, attempt in zip(tasks, attempts, strict=True):
            ledger.commit(t.task_id, attempt, DIGEST)
        ledger.consume([t.task_id for t in tasks], step)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.010  # CPU seconds; the minimum, for other work shares the machine
