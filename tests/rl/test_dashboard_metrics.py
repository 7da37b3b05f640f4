"""Lines of metrics.jsonl as columns, read as they grow, thinned, and sent to a page that watches."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.dashboard.folders import find_run
from rl.dashboard.metrics import Cursor, MetricTable, read_new_lines, thin
from rl.dashboard.stream import follow
from tests.rl.dashboard_runs import RUN, make_run


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    first = read_new_lines(path, Cursor())
    assert first.rows == ({"a": 1},)
    with path.open("a") as file:
        file.write("2}\n")
    second = read_new_lines(path, Cursor.parse(str(first.cursor)))
    assert second.rows == ({"a": 2},) and not second.restarted
    path.with_suffix(".new").write_text('{"a": 9}\n')
    path.with_suffix(".new").replace(path)  # a resumed run rewrites the file
    third = read_new_lines(path, second.cursor)
    assert third.restarted and third.rows == ({"a": 9},)


def test_a_line_of_absurd_length_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 9_000_000 + b'"}\n{"a": 2}\n')
    cursor, rows, num_bad = Cursor(), [], 0
    for _ in range(20):
        new = read_new_lines(path, cursor)
        cursor, rows, num_bad = new.cursor, [*rows, *new.rows], num_bad + new.num_bad
    assert rows == [{"a": 1}, {"a": 2}] and num_bad >= 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 50))
def test_thinned_series_keep_their_ends_and_extremes_and_their_size(values: list[float], max_points: int) -> None:
    picks = thin(values, max_points)
    assert len(picks) <= max(max_points, 4)
    assert picks == sorted(set(picks)) and picks[0] == 0 and picks[-1] == len(values) - 1
    assert {min(values), max(values)} <= {values[i] for i in picks}


@pytest.mark.slow
def test_a_stream_goes_on_after_the_last_id_without_repeating_or_losing_a_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path)

    def listen(last_id: str, wanted: int) -> tuple[list[dict], str]:
        async def read() -> tuple[list[dict], str]:
            rows: list[dict] = []
            identity = last_id
            async for text in follow(find_run(tmp_path, RUN), last_id, lambda: len(rows) >= wanted):
                fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
                if fields.get("event") in ("metrics", "event"):
                    rows.extend(json.loads(fields["data"])["rows"])
                    identity = fields["id"]
            return rows, identity

        return asyncio.run(asyncio.wait_for(read(), 20))

    first, identity = listen("", 6)
    assert len(first) == 6  # 4 lines of metrics, 2 events
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4}\n')
    second, _ = listen(identity, 1)
    assert second == [{"kind": "step", "step": 4}]


def test_ten_thousand_steps_come_in_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "step", "step": i, "a": i % 7}) + "\n" for i in range(10_000)))
    table = MetricTable(path)
    table.refresh()
    series = table.series(["a"], 2000)["a"]
    assert series["n"] == 10_000 and len(series["y"]) <= 2000


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["kind", "step", "time_s", "a", "b", "rows/x", "trainer/tokens"]),
            st.sampled_from(["step", "evaluation", 1, 2.5, -3.0, None, True, "text", [1], {"c": 1}, 10**400]),
        ),
        max_size=30,
    )
)
def test_columns_are_those_of_reading_one_row_after_the_other(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = MetricTable(path)
        table.refresh()
    found = table.series(["a"], 2000)["a"]

    def number(value: object) -> float | None:
        return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # type: ignore[arg-type]

    shown = [i for i, row in enumerate(rows) if "a" in row and (row["a"] is None or number(row["a"]) is not None)]
    assert found["y"] == [number(rows[i]["a"]) for i in shown]
    assert found["step"] == [number(rows[i].get("step")) or 0.0 for i in shown]
    steps = [row if row.get("kind") == "step" else {} for row in rows]
    for axis, name in (("tokens", "trainer/tokens"), ("trajectories", "rows/x")):
        assert found[axis] == [sum(number(row.get(name)) or 0.0 for row in steps[: i + 1]) for i in shown]
    assert table.last == next((row for row in reversed(rows) if row.get("kind") == "step"), {})
