"""The check of a GPU: its steps on the CPU, with tiny sizes, and what becomes of steps that fail or do not fit."""

import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from conftest import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "benchmarks"))

import check_gpu
import gpu_step
import run_all

ROWS = {  # of a dry run: step: how many rows each of its tables has
    "versions": [10],
    "whole_script": [2],
    "cuda_graphs": [6],
    "gradients": [2, 8],
    "training": [4],
    "recipe": [1],
    "generation": [10],
    "hugging_face": [3, 3],
    "ranks": [1],
    "options": [8],
    "compiled": [2],
}


SOME = ("gradients", "training", "generation")  # the quick ones


@pytest.mark.parametrize(
    "chosen", [SOME, pytest.param(tuple(ROWS), marks=pytest.mark.skipif("SOAK" not in os.environ, reason="make soak"))]
)
def test_a_dry_run(chosen, tmp_path):
    program = str(REPO_ROOT / "benchmarks" / "check_gpu.py")
    command = [sys.executable, program, "--dry-run", "--output", str(tmp_path), "--only", *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    steps = json.loads((tmp_path / "check_gpu.json").read_text())["steps"]
    assert ROWS.keys() == check_gpu.STEPS.keys()
    assert {step["step"]: step["result"] for step in steps} == dict.fromkeys(chosen, "ok"), done.stdout
    assert {step["step"]: [len(table) for table in step["tables"]] for step in steps} == {s: ROWS[s] for s in chosen}
    assert done.returncode == 0
    assert (tmp_path / "check_gpu.md").read_text().count("| --- |") > len(steps)


def good(setting):
    gpu_step.table("way", "ms")
    gpu_step.row("good", setting.device)


def failing(setting):
    good(setting)
    raise ValueError("a | b")


def wrong(setting):
    good(setting)
    gpu_step.fail("the ids differ")


def endless(setting):
    good(setting)
    time.sleep(600)


@pytest.fixture
def fake_steps(monkeypatch):
    functions = {function.__name__: function for function in (failing, endless, wrong, good)}
    monkeypatch.setitem(sys.modules, "fake_steps", types.SimpleNamespace(**functions))
    limits = dict.fromkeys(functions, 60) | {"endless": 0.2}  # ten times as much in a dry run
    monkeypatch.setattr(check_gpu, "STEPS", {n: check_gpu.Step(limits[n], "fake_steps", n) for n in functions})


def test_a_step_that_fails_loses_nothing(fake_steps, tmp_path, capfd):
    records = check_gpu.check(check_gpu.parse(["--dry-run", "--output", str(tmp_path)]))
    assert {record["step"]: record["result"] for record in records} == {
        "failing": "failed: ValueError: a | b",
        "endless": "stopped: over its limit of 2 s",
        "wrong": "failed: the ids differ",
        "good": "ok",
    }
    steps = json.loads((tmp_path / "check_gpu.json").read_text())["steps"]
    assert all(step["tables"] == [[{"way": "good", "ms": "cpu"}]] for step in steps)
    assert "| failing | " in (text := (tmp_path / "check_gpu.md").read_text()) and "ValueError: a / b" in text
    assert capfd.readouterr().out.count("| good | cpu |") == 4


def test_steps_that_no_longer_fit(fake_steps, tmp_path, capsys):
    arguments = ["--dry-run", "--minutes", "0.1", "--only", "wrong", "good", "--output", str(tmp_path)]
    records = check_gpu.check(check_gpu.parse(arguments))
    assert [record["result"] for record in records] == ["not run: no time left"] * 2
    assert capsys.readouterr().out.count("not run: no time left") == 2


def test_a_step_is_a_process_of_its_own_on_a_gpu(tmp_path, capfd):
    """A dry run forks its steps; this one is started as all are on a GPU."""
    args = check_gpu.parse(["--dry-run", "--only", "versions", "--output", str(tmp_path)])
    args.fork = False
    [record] = check_gpu.check(args)
    assert record["result"] == "ok", capfd.readouterr().out
    assert [len(table) - 2 for table in check_gpu.tables_in(record["output"])] == ROWS["versions"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "| ViT | 2 | out of memory |\n"),
        (ValueError("two\nlines"), "| ViT | 2 | failed |\n\nFAILED: ViT, 2: ValueError: two lines\n\n"),
        (SystemExit("error: no"), "| ViT | 2 | failed |\n\nFAILED: ViT, 2: SystemExit: error: no\n\n"),
    ],
)
def test_a_variant_that_goes_wrong_is_a_row(error, said, capsys):
    with gpu_step.variant("ViT", 2):
        raise error
    assert capsys.readouterr().out == said


def test_results_keep_what_was_not_run(fake_steps, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(check_gpu.signal, "signal", lambda *_: None)
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE"):  # set by main
        monkeypatch.setenv(name, "1")
    run_all.write_section("Training", "as it was")
    record = dict(
        step="good", seconds=3.0, result="ok", output="a GPU, torch 3\n\n| a |\n| --- |\n| 1 |\n\n<p>\n| 2 |\n"
    )
    lost = dict(step="wrong", seconds=0.0, result="running", output="")
    skipped = dict(step="good", seconds=0.0, result=check_gpu.NOT_RUN, output="")
    for records in ([record, lost], [skipped]):
        monkeypatch.setattr(check_gpu, "check", lambda args, records=records: records)
        assert check_gpu.main(["--results", "--output", str(tmp_path)]) == 1
    found = run_all.read_results()
    assert found["Training"].strip() == "as it was"
    parts = found[run_all.ONE_GPU].split("\n### ")
    assert [part.partition("\n")[0] for part in parts[1:]] == list(check_gpu.STEPS)
    assert parts[1].endswith("not measured\n")
    assert ", 3 s: ok. a GPU, torch 3\n\n| a |\n| --- |\n| 1 |\n| 2 |\n" in parts[4]
    with pytest.raises(SystemExit):
        check_gpu.parse(["--results", "--dry-run"])


def test_the_steps_are_listed(capsys):
    assert check_gpu.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in check_gpu.STEPS)
