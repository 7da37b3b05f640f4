"""The events of a group: one for each change of the ledger, in its transaction, enough to tell every state again."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from rollout.record.ledger import Ledger, LedgerError, read_audit
from rollout.record.lineage import STATE_AFTER, LineageEvent, group_events, newest_events, read_lineage, story
from tests.fakes import FakeClock
from tests.rollout.test_ledger import DIGEST, committed, task


def test_a_group_s_events_tell_when_by_whom_and_why(tmp_path: Path) -> None:
    clock = FakeClock()
    ledger, group_id = Ledger(tmp_path / "l", unix_clock=clock), task(0).task_id
    ledger.issue([task(0), task(1)])
    clock.advance(1.0)
    first = ledger.lease(group_id, "worker-0", 10.0)
    clock.advance(2.0)
    ledger.release(group_id, first, "worker_lost")
    second = ledger.lease(group_id, "worker-1", 10.0)
    clock.advance(3.0)
    assert not ledger.commit(group_id, first, DIGEST)  # the lost worker lives after all
    assert ledger.commit(group_id, second, DIGEST)
    ledger.drop(task(1).task_id, "env_error")
    clock.advance(4.0)
    ledger.consume([group_id], step=7)
    ledger.close()

    events = read_lineage(tmp_path / "l", group_id)
    start_s = events[0].unix_s
    assert [(e.event, e.unix_s - start_s, e.attempt, e.worker, e.step, e.cause) for e in events] == [
        ("issued", 0.0, None, None, None, None),
        ("leased", 1.0, 1, "worker-0", None, None),
        ("released", 3.0, 1, "worker-0", None, "worker_lost"),
        ("leased", 3.0, 2, "worker-1", None, None),
        ("refused", 6.0, 1, None, None, None),
        ("committed", 6.0, 2, "worker-1", None, None),
        ("consumed", 10.0, 2, "worker-1", 7, None),
    ]
    assert story(events) == (
        "issued → leased to worker-0 (1.0 s) → released: worker_lost (3.0 s) → leased again to worker-1 (3.0 s) → "
        "late answer of attempt 1 refused (6.0 s) → committed (6.0 s) → consumed at step 7 (10.0 s)"
    )
    assert story(read_lineage(tmp_path / "l", task(1).task_id)) == "issued → dropped: env_error (6.0 s)"


def test_a_resume_is_told_group_by_group(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 3)
    for step, group_id in enumerate(ids, start=1):
        ledger.consume([group_id], step)
    ledger.issue([task(10)])
    ledger.lease(task(10).task_id, "worker-0", 10.0)
    ledger.rewind(2)
    ledger.requeue(ids[2], "resume")
    last = {group_id: group_events(ledger._db, group_id)[-2:] for group_id in (*ids, task(10).task_id)}
    assert [(e.event, e.step, e.cause) for e in last[ids[1]]] == [("committed", None, None), ("consumed", 2, None)]
    assert [(e.event, e.step, e.cause) for e in last[ids[2]]] == [
        ("recommitted", 3, "resume"),
        ("requeued", None, "resume"),
    ]
    assert [(e.event, e.cause) for e in last[task(10).task_id]] == [("leased", None), ("released", "resume")]


def _state_of(events: list[LineageEvent]) -> str:
    return [STATE_AFTER[e.event] for e in events if e.event != "refused"][-1]


def test_the_last_event_of_every_group_is_its_state_after_any_changes_and_refusals(tmp_path: Path) -> None:
    rng = random.Random(0)
    ledger = Ledger(tmp_path / "l")
    ledger._db.execute("PRAGMA synchronous=OFF")
    ids: list[str] = []
    for number in range(1200):
        if not ids or rng.random() < 0.15:
            ledger.issue([task(number)])
            ids.append(task(number).task_id)
            continue
        group_id = rng.choice(ids)
        attempt = max(1, ledger.attempts(group_id) - (rng.random() < 0.2))
        try:
            match rng.randrange(7):
                case 0 | 1:
                    ledger.lease(group_id, "w", 1.0)
                case 2 | 3:
                    ledger.commit(group_id, attempt, DIGEST)
                case 4:
                    ledger.release(group_id, attempt, "lost")
                case 5:
                    ledger.consume([group_id, rng.choice(ids)], number)
                case _:
                    ledger.rewind(number - 5) if rng.random() < 0.05 else ledger.requeue(group_id, "whim")
        except LedgerError:
            continue
    states = dict(ledger._db.execute("SELECT group_id, state FROM groups").fetchall())
    told = {group_id: group_events(ledger._db, group_id) for group_id in ids}
    assert {group_id: _state_of(events) for group_id, events in told.items()} == states
    assert {"queued", "leased", "committed", "consumed"} <= set(states.values())
    for group_id, events in told.items():  # every lease is told once, under its own number
        leases = [e.attempt for e in events if e.event == "leased"]
        assert leases == list(range(1, ledger.attempts(group_id) + 1))
    assert (
        sum(e.event == "refused" for events in told.values() for e in events) == ledger.audit()["refused_commits"] > 0
    )
    newest = newest_events(ledger._db, before=0, limit=5)
    assert [e.number for e in newest] == sorted((e.number for e in newest), reverse=True)
    older = newest_events(ledger._db, before=newest[-1].number, limit=1)
    assert older[0].number == newest[-1].number - 1


def test_what_is_undone_leaves_no_event(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 1)
    before = group_events(ledger._db, ids[0])
    with pytest.raises(ZeroDivisionError), ledger.batch():
        ledger.consume(ids, step=1)
        _ = 1 / 0
    assert group_events(ledger._db, ids[0]) == before


def test_a_ledger_from_before_events_reads_and_goes_on(tmp_path: Path) -> None:
    ledger, ids = committed(tmp_path / "l", 1)
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "l")) as db, db:
        db.execute("DROP TABLE events")
    assert read_lineage(tmp_path / "l", ids[0]) == []
    assert read_audit(tmp_path / "l")["balanced"]
    ledger = Ledger(tmp_path / "l")
    ledger.consume(ids, step=1)
    assert [(e.event, e.step) for e in read_lineage(tmp_path / "l", ids[0])] == [("consumed", 1)]


def test_events_of_a_foreign_file_are_read_as_text(tmp_path: Path) -> None:
    ledger, group_id = Ledger(tmp_path / "l", unix_clock=FakeClock()), task(0).task_id
    ledger.issue([task(0)])
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "l")) as db:
        db.execute("UPDATE events SET event = x'6c6f7374', worker = x'77', cause = 5")
        db.commit()
    (event,) = read_lineage(tmp_path / "l", group_id)
    assert (event.event, event.worker, event.cause) == ("lost", "w", "5")
    assert story([event]) == "lost: 5 (0.0 s)"
