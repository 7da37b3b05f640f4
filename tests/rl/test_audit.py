"""shoal audit: the balance of a ledger, and what is said where there is none or it does not balance."""

import json
import shutil
import sqlite3
from contextlib import closing

from rl.cli.main import main


def test_the_balance_is_what_the_ledger_holds_and_what_was_trained(runs, capsys):
    assert main(["audit", "first-run", "--root", str(runs), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["balanced"] and report["consumed"] == 3 * 2  # steps times groups
    parts = (report[state] for state in ("queued", "leased", "committed", "consumed"))
    assert report["issued"] == sum(parts) + sum(report["dropped"].values())


def test_a_lost_group_ends_with_1_and_says_so(runs, tmp_path, capsys):
    shutil.copytree(runs / "first-run", tmp_path / "first-run")
    with closing(sqlite3.connect(tmp_path / "first-run" / "ledger.sqlite")) as db, db:
        db.execute("DELETE FROM groups WHERE ordinal = 1")
    assert main(["audit", str(tmp_path / "first-run")]) == 1
    assert "groups issued is not" in capsys.readouterr().out


def test_reasons_are_counted(runs, tmp_path, capsys):
    shutil.copytree(runs / "first-run", tmp_path / "first-run")
    with closing(sqlite3.connect(tmp_path / "first-run" / "ledger.sqlite")) as db, db:
        db.execute("UPDATE groups SET state = 'dropped', reason = 'env_error', step = NULL WHERE ordinal = 1")
    assert main(["audit", "first", "--root", str(tmp_path)]) == 0
    assert "dropped, env_error: 1" in capsys.readouterr().out


def test_a_run_without_a_ledger_or_with_a_damaged_one_is_told_in_words(runs, tmp_path, capsys):
    shutil.copytree(runs / "first-run", tmp_path / "first-run", ignore=shutil.ignore_patterns("ledger*"))
    assert main(["audit", "first-run", "--root", str(tmp_path)]) == 2
    assert "has no ledger" in capsys.readouterr().err
    (tmp_path / "first-run" / "ledger.sqlite").write_bytes(b"not a database" * 99)
    assert main(["audit", "first-run", "--root", str(tmp_path)]) == 2
    assert "cannot read the ledger" in capsys.readouterr().err
