"""One sweep: what its runs note of it, and how they are compared."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.loading import load_config
from rl.cli.main import main
from rl.cli.sweep import run_sweep, swept_settings
from rl.dashboard.server import Dashboard, Stop
from rl.dashboard.sweeps import T_975, interval
from rl.runs.run_folder import RunFolder
from tests.rl.dashboard_runs import save_picture, start_server, until

SWEEP = "20261128-120000-beef"
RESULTS = {  # (steps, seed) -> success after; the last has none yet
    ("2", "0"): 0.5,
    ("2", "1"): 0.75,
    ("2", "2"): 0.625,
    ("4", "0"): 0.875,
    ("4", "1"): 1.0,
    ("4", "2"): None,
}


def make_sweep(root: Path) -> None:
    """Six runs, each with a curve of eval/success from 0 to its result over as many steps as it says."""
    for number, ((steps, seed), success) in enumerate(RESULTS.items(), start=1):
        folder = RunFolder.create(root, "calc", "tiny", name=f"calc-{SWEEP}-{number}")
        place = {"id": SWEEP, "number": number, "of": 7, "settings": {"learner.steps": steps, "seed": seed}}
        folder.write_manifest(seed=int(seed), environments={}, argv=[], sweep=place)
        if success is None:
            continue
        folder.write_summary({"success_before": 0.25, "success_after": success, "ci95": [0.1, 0.9], "n": 8})
        folder.finish("finished")
        with folder.metrics.open("w") as file:
            for step in range(int(steps) + 1):
                row = {"kind": "evaluation", "step": step, "eval/success": success * step / int(steps)}
                file.write(json.dumps(row | {"time_s": step * (1.0 + int(seed))}) + "\n")


def test_a_sweep_differs_in_what_its_combinations_do_not_share() -> None:
    words = [["steps=9", f"seed={s}", f"a={{b: {x}=2}}"] for s in (1, 2) for x in (3, 4)]
    assert swept_settings(words)[1] == {"seed": "1", "a": "{b: 4=2}"}
    assert swept_settings(words[:1]) == [{}]


def test_the_interval_over_seeds_is_student_s() -> None:
    assert interval([0.8, 0.9, 1.0]) == pytest.approx((0.9 - 4.303 * 0.1 / math.sqrt(3), 1.0))
    assert interval([0.5] * 40) == (0.5, 0.5)
    assert len(T_975) == 30 and sorted(T_975, reverse=True) == list(T_975)


def test_rows_are_combinations_and_their_figures_those_of_the_stored_results(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    RunFolder.create(tmp_path, "calc", "tiny", name="alone").write_manifest(seed=1, environments={}, argv=[])
    board = Dashboard(tmp_path, Stop())
    told = board.sweep({"id": SWEEP})
    assert (told["keys"], told["of"]) == (["learner.steps"], 7)
    assert {run["sweep"] for run in board.runs({})["runs"]} == {SWEEP, ""}
    for row in told["rows"]:
        (steps,) = row["settings"]
        values = [value for (s, _), value in RESULTS.items() if s == steps and value is not None]
        half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        assert (
            row["mean"] == statistics.mean(values) and row["seeds"] == len(values) and row["tasks"] == 8 * len(values)
        )
        assert (row["low"], row["high"]) == pytest.approx((max(0, row["mean"] - half), min(1, row["mean"] + half)))
        assert [run["seed"] for run in row["runs"]] == ["0", "1", "2"] and row["over"] == "seeds"
    assert told["rows"][1]["runs"][2]["success_after"] is None


def test_one_seed_has_the_interval_of_its_own_tasks_and_broken_manifests_are_of_no_sweep(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    for number in (2, 3):
        (tmp_path / f"calc-{SWEEP}-{number}" / "manifest.json").write_text('{"sweep": {"id": 3, "settings": []}}')
    row = Dashboard(tmp_path, Stop()).sweep({"id": SWEEP})["rows"][0]
    assert (row["seeds"], row["mean"], row["low"], row["high"], row["over"]) == (1, 0.5, 0.1, 0.9, "tasks")


def test_ls_lists_sweeps_below_the_runs_and_what_differs_in_them(capsys, tmp_path: Path) -> None:
    make_sweep(tmp_path)
    alone = RunFolder.create(tmp_path, "calc", "tiny", name="alone")
    here = ["ls", "--root", str(tmp_path)]
    assert main([*here, "--text", "alone"]) == 0
    assert "sweep" not in capsys.readouterr().out  # no table where there is nothing to list
    assert main(here) == 0
    told = capsys.readouterr().out
    assert "6 of 7" in told and "learner.steps=2,4 seed=0,1,2" in told and told.index("alone") < told.index("6 of 7")
    assert main([*here, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [f"calc-{SWEEP}-{number}" for number in range(1, 7)]
    varied = {"learner.steps": ["2", "4"], "seed": ["0", "1", "2"]}
    assert answer["sweeps"] == [{"id": SWEEP, "runs": names, "of": 7, "varied": varied}]
    of = {row["run"]: row["sweep"] for row in answer["runs"]}
    assert of[alone.name] is None and of[names[3]]["number"] == 4 and of[names[3]]["settings"]["learner.steps"] == "4"


def test_what_a_manifest_says_of_its_sweep_is_printed_as_text(capsys, tmp_path: Path) -> None:
    place = {"id": "[red]x\x1b[31m", "number": 1, "of": 1, "settings": {"[bold]k": "\x1b[2J"}}
    RunFolder.create(tmp_path, "calc", "tiny", name="a").write_manifest(seed=1, environments={}, argv=[], sweep=place)
    main(["ls", "--root", str(tmp_path)])
    told = capsys.readouterr().out
    assert "\x1b" not in told and "[red]x" in told and "[bold]k=" in told


@pytest.mark.slow
def test_each_run_of_a_sweep_notes_in_its_manifest_which_one_it_is(capsys, tmp_path: Path) -> None:
    words = ["experiment=smoke", "cluster=inprocess", "monitor=quiet", f"run.root={tmp_path}"]
    combinations = [[*words, "seed=1"], [*words, "seed=2"]]
    configs = [load_config(chosen) for chosen in combinations]

    def here(arguments: Sequence[str]) -> int:
        return main(arguments[2:])

    assert run_sweep(combinations, configs, run=here) == 0
    manifests = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("calculator-*/manifest.json"))]
    assert [m["sweep"]["settings"] for m in manifests] == [{"seed": "1"}, {"seed": "2"}]
    assert [(m["sweep"]["number"], m["sweep"]["of"]) for m in manifests] == [(1, 2), (2, 2)]
    (sweep,) = {m["sweep"]["id"] for m in manifests}
    assert f"#/sweep/{sweep}" in capsys.readouterr().out
    assert Dashboard(tmp_path, Stop()).sweep({"id": sweep})["rows"][0]["seeds"] == 2


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_of_a_sweep_shows_the_stored_results_and_draws_a_mean_with_its_range(
    page: Any, tmp_path: Path
) -> None:
    make_sweep(tmp_path)
    server, address = start_server(tmp_path)
    try:
        page.goto(address)
        until(page, "document.getElementById('view').dataset.ready === '#/'")
        page.click(f"#view td a:text-is('{SWEEP}') >> nth=0")
        until(page, "document.getElementById('view').dataset.ready?.startsWith('#/sweep')")
        rows = [row.locator("td").all_inner_texts() for row in page.locator("[data-row]").all()]
        assert [cells[:3] for cells in rows] == [["2", "0.25", "0.625"], ["4", "0.25", "0.938"]]
        low, high = interval([0.5, 0.75, 0.625])
        assert rows[0][3] == f"{low:.3g} to {high:.3g} over seeds" and rows[0][4:6] == ["3", "24"]
        assert page.inner_text("#progress") == "6 of 7 runs so far, 5 of them with a result"
        save_picture(page, tmp_path, "sweep")
        drawn = page.evaluate(
            "document.getElementById('overlay').data.map((t) => [t.name, Array.from(t.x), Array.from(t.y)])"
        )
        assert [d for d in drawn if d[0]] == [
            ["learner.steps=2, 3 runs", [0, 1, 2], [0, 0.3125, 0.625]],
            ["learner.steps=4, 2 runs", [0, 1, 2, 3, 4], pytest.approx([0.9375 * n / 4 for n in range(5)])],
        ]
        assert [d[2] for d in drawn if not d[0]][:2] == [[0, 0.25, 0.5], [0, 0.375, 0.75]]
        page.goto(f"{address}#/sweep/{SWEEP}?key=eval/success&x=time_s")  # seconds differ from seed to seed
        until(page, "document.getElementById('view').dataset.ready === location.hash")
        x, y = page.evaluate(
            "(() => { const t = document.getElementById('overlay').data[2]; return [[...t.x], [...t.y]]; })()"
        )
        assert (x, y) == ([0, 1, 2], pytest.approx([0, (0.25 + 0.1875 + 0.625 / 6) / 3, (0.5 + 0.375 + 0.625 / 3) / 3]))
        page.click("[data-row] >> nth=0 >> a:text-is('overlay')")
        until(
            page, "location.hash.includes('mean=1') && document.getElementById('view').dataset.ready === location.hash"
        )
        assert page.locator("#view tbody input:checked").count() == 3
    finally:
        server.kill()
        server.wait(10)
