"""shoal plot: pictures of a run's curves."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rl.cli.main import main
from rl.cli.readers.plot import DPI, HEIGHT_IN, WIDTH_IN, Panel, draw, with_values

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"kind": "step", "step": step, "reward/mean": value} for step, value in enumerate((0.1, None, 0.9))]


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_a_run_becomes_one_png_of_all_panels(runs, tmp_path, capsys):
    path = tmp_path / "curves.png"
    assert main(["plot", "first-run", "--root", str(runs), "-o", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["path"] == str(path) and told["bytes"] == path.stat().st_size
    assert {"eval/success", "reward/mean", "off_policy/lag/max"} <= set(told["metrics"])
    assert size(path.read_bytes()) == (round(2 * WIDTH_IN * DPI), round(3 * HEIGHT_IN * DPI))


def test_the_default_file_is_named_for_the_run_and_stands_here(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "first", "reward/mean", "--root", str(runs)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["first-run.png"]


def test_a_curve_is_drawn_with_a_gap_where_a_value_was_not_finite():
    panel = Panel(title="x", metrics=("reward/mean",))
    assert with_values(ROWS)[0].metrics == ("reward/mean",)
    assert draw(ROWS, [panel]) != draw(ROWS[:2], [panel])


def test_a_name_that_looks_like_mathematics_is_drawn_as_it_is():
    assert draw(
        [{"kind": "step", "step": 1, "reward/$\\frac{": 1.0}], [Panel(title="$\\frac{", metrics=("reward/$\\frac{",))]
    )


@pytest.mark.parametrize(
    ("word", "told"), [("reward/maen", "Did you mean 'reward/mean'?"), ("step", "no metric 'step'")]
)
def test_an_unknown_metric_is_told_in_words(runs, tmp_path, capsys, word, told):
    assert main(["plot", "first-run", word, "--root", str(runs), "-o", str(tmp_path / "x.png")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_without_matplotlib_the_extra_to_install_is_named(runs, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from rl.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["plot", "first-run", "--root", str(runs), "-o", str(tmp_path / "x.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "pip install 'shoal[report]'" in done.stderr
