"""The benchmarks' tools: who is timed when, and how numbers are shown. No test looks at a time."""

import sys

import pytest

from conftest import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "benchmarks"))

import bench_data
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


def test_photos_of_the_input_benchmark(tmp_path, script):
    """Their JPEGs are about as large as photos', and each way makes what a model takes; a wrong size is noticed."""
    photos, small = bench_data.write_photos(tmp_path, (500, 375), 2)
    assert all(80_000 < path.stat().st_size < 150_000 for path in photos)
    training, validation = script.build_transforms(bench_data.IMG_SIZE)
    for tfms in (training, validation):
        bench_data.ready(photos, tfms, training.least_side)
        bench_data.ready(small, tfms, None)
    with pytest.raises(ValueError, match=r"0\.jpg: \(3, 32, 32\)"):
        bench_data.ready(photos, script.build_transforms(32)[1], None)
