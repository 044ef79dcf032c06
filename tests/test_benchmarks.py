"""The benchmarks' tools: who is timed when, and how numbers are shown. No test looks at a time."""

import sys

import pytest

from conftest import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "benchmarks"))

import timing


def test_candidates_take_turns_in_rotated_order():
    calls = []
    seconds = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert list(seconds) == list("abc")
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([3, 1, 2], "2.00 (1.00 to 3.00)"),
        ([1234.5, 99.96, 12.34], "100 (12.3 to 1,234)"),
        ([0.0012345], "0.00123 (0.00123 to 0.00123)"),
    ],
)
def test_medians_and_ranges(values, shown):
    assert timing.median_and_range(values) == shown


def test_the_machine_in_one_line():
    line = timing.machine()
    assert "cores" in line and "torch" in line and "\n" not in line
