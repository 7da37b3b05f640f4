"""shoal note: what it writes, who reads it, and what it refuses."""

import json
from pathlib import Path

import pytest

from rl.cli.main import main
from rl.runs.notes import Notes, read_notes, write_notes
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError


def _runs(root: Path) -> None:
    for name in ("alpha", "beta"):
        RunFolder.create(root, "calc", "tiny", name=name)


def _last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_note_replaces_the_one_before_and_tags_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _runs(tmp_path)
    here = ["--root", str(tmp_path), "--json"]
    assert main(["note", "alpha", "first", "--tag", "b", "--tag", "a", *here]) == 0
    assert _last(capsys) == {"run": "alpha", "note": "first", "tags": ["a", "b"]}
    assert main(["note", "alp", "second", "--untag", "b", "--tag", "a", *here]) == 0
    assert _last(capsys) == {"run": "alpha", "note": "second", "tags": ["a"]}
    assert main(["note", str(tmp_path / "alpha"), *here]) == 0  # by its path; nothing to write
    assert _last(capsys)["note"] == "second"
    assert main(["note", "alpha", "", *here]) == 0
    assert _last(capsys) == {"run": "alpha", "note": "", "tags": ["a"]}
    assert sorted(path.name for path in (tmp_path / "alpha").iterdir()) == [
        "checkpoints", "logs", "notes.json", "run.json"
    ]  # fmt: skip


def test_ls_shows_them_and_finds_runs_by_tag_and_by_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _runs(tmp_path)
    here = ["--root", str(tmp_path)]
    assert main(["ls", *here]) == 0
    assert "tags" not in capsys.readouterr().out  # no column that nobody fills
    main(["note", "alpha", "Diverged\x1b[31m\nat step 7", "--tag", "baseline", "--tag", "old", *here])
    assert "\x1b" not in capsys.readouterr().out
    main(["ls", *here])
    shown = capsys.readouterr().out
    assert "baseline old" in shown and "Diverged" in shown and "\x1b" not in shown

    def found(*words: str) -> list[str]:
        assert main(["ls", *words, *here, "--json"]) == 0
        return [row["run"] for row in _last(capsys)["runs"]]

    assert found("--tag", "baseline", "--tag", "old") == ["alpha"]
    assert found("--tag", "baseline", "--tag", "new") == []
    assert found("--text", "diverged") == ["alpha"] and found("--text", "BET") == ["beta"]
    main(["ls", "--tag", "new", *here])
    assert capsys.readouterr().out == f"none of the 2 runs in {tmp_path}/ fits\n"


@pytest.mark.parametrize(
    ("notes", "says"),
    [
        (Notes(tags=("two words",)), "'two words'"),
        (Notes(tags=("-x",)), "no sign first"),
        (Notes(tags=tuple(f"t{n}" for n in range(51))), "at most 50 tags; got 51"),
        (Notes(note="x" * 4001), "at most 4000 characters; got 4001"),
    ],
)
def test_what_is_no_note_is_refused_and_nothing_is_written(tmp_path: Path, notes: Notes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        write_notes(tmp_path, notes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"note": 1, "tags": "x"}', "[" * 50_000, '{"note": "' + "x" * 70_000]
)
def test_a_file_that_is_not_ours_reads_as_no_note(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.json").write_text(text)
    assert read_notes(tmp_path) == Notes()


def test_a_link_is_not_followed_and_what_is_no_tag_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"note": "n", "tags": ["b", 1, "<b>", "a", "a"]}')
    assert read_notes(tmp_path) == Notes(note="n", tags=("a", "b"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.json").symlink_to(tmp_path / "notes.json")
    assert read_notes(tmp_path / "run") == Notes()
