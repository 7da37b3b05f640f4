"""Writes the table of docs/results.md that says which committed results are older than what they measure.

python -m scripts.stale_results
"""

from pathlib import Path

from benchmarks.stored_result import RESULTS, why_stale

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- begin stale -->", "<!-- end stale -->"


def with_stale_results(page: str) -> str:
    """The page with everything between the marks made again."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE.name} has no {BEGIN} ... {END}")
    rows = [f"| `{path.name}` | {why} |" for path in sorted(RESULTS.glob("*.json")) if (why := why_stale(path))]
    table = ["| result | why it is old |", "|---|---|", *rows] if rows else ["None."]
    return before + "\n".join([BEGIN, *table, END]) + after


if __name__ == "__main__":
    PAGE.write_text(with_stale_results(PAGE.read_text()))
