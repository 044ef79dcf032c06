"""Trackers: what they are told can be read back, and whatever they do, the run goes on."""

import json
import math
import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from captioning.training import trackers
from captioning.training.trackers import Tracker
from conftest import CAPTIONS, REPO_ROOT
from helpers.runs import TINY, stop_after

SCRIPT = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "MyLLM_Vit_gpt2_captioning.py"


def events(folder):
    """-> ({tag: [(step, value), ...]}, the accumulator) of the event files, as TensorBoard shows them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}, read


class Broken:
    """A backend whose every call fails."""

    def __init__(self, tracker, config, first_step):
        pass

    def log(self, *args):
        raise ConnectionError("network down.\nsecond line")

    show = finish = log


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_run(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", tracker="tensorboard", log_steps=2, epochs=2)
    trainer.run_training()
    trainer.log.tracker.finish()
    scalars, read = events(tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    steps = len(trainer.train_dl)
    for name in table.columns.drop(["epoch", "stage"]):
        told = scalars[f"epoch/{name}"]
        assert [step for step, _ in told] == [steps, 2 * steps]
        assert [value for _, value in told] == pytest.approx(table[name].tolist()), name
    assert [value for _, value in scalars["epoch"]] == [1, 2]
    assert [step for step, _ in scalars["training/loss"]] == [2 * (i + 1) for i in range(steps)]
    losses = [point["loss"] for point in trainer.log.points]
    assert [value for _, value in scalars["training/loss"]] == pytest.approx(losses)
    assert len(scalars["training/lr"]) == len(scalars["training/loss"]) == steps
    assert len(scalars["epoch/captions_per_second"]) == 2
    assert {"samples/1", "samples/2"} <= set(read.Tags()["images"])
    assert [image.step for image in read.Images("samples/1")] == [steps, 2 * steps]
    tensors = read.Tags()["tensors"]
    assert {"configuration/model/text_summary", "samples/text_summary"} <= set(tensors)
    text = read.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert CAPTIONS[0] in text
    assert (
        "| embed_dim | 32 |" in read.Tensors("configuration/model/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def save_between_epochs(state, content):
    """As when a run is killed: what it did since the last epoch is lost."""
    if not state.position["batches"]:
        type(state).save(state, content)


def test_a_resumed_run_is_the_same_in_tensorboard(make_trainer, tmp_path, monkeypatch):
    """Killed in the second epoch, so that steps behind the last state are done again: no point comes twice."""
    pytest.importorskip("tensorboard")
    scalars = []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        trainer = make_trainer(folder, tracker="tensorboard", log_steps=1)
        if stop:
            stop_after(trainer, len(trainer.train_dl) + stop, RuntimeError())
            monkeypatch.setattr(trainer.state, "save", partial(save_between_epochs, trainer.state))
            with pytest.raises(RuntimeError):
                trainer.run_training()
            first = trainer.log.tracker.id
            trainer = make_trainer(folder, tracker="tensorboard", log_steps=1, resume="auto")
            assert trainer.log.tracker.id == first
        trainer.run_training()
        trainer.log.tracker.finish()
        scalars.append(events(folder)[0])
        del scalars[-1]["epoch/captions_per_second"]
    assert [len(told) for told in scalars[0].values()].count(3 * len(trainer.train_dl)) == 2  # loss and lr
    assert scalars[0] == scalars[1]


# --- Weights & Biases and trackio, without a network ------------------------------------------------------------------


def run_and_resume(tracker, flickr, folder, **environment):
    """Two epochs, then a third one, in a process of their own: only there the libraries start without a past."""
    arguments = ["--data_dir", flickr, "--model_path", folder, *TINY, "--tracker", tracker, "--log_steps", "2"]
    code = (
        "import sys, MyLLM_Vit_gpt2_captioning as script\n"
        "script.main(sys.argv[1:])\n"
        "script.main([*sys.argv[1:], '--epochs', '3', '--resume', 'auto'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=SCRIPT.parent, capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout


def wandb_history(file):
    """A .wandb file, records in LevelDB's log format -> its rows of history and its run record."""
    from wandb.proto import wandb_internal_pb2

    data, place, content, rows, run = file.read_bytes(), 7, b"", [], None  # behind a head of 7 bytes
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left  # too little of the block for a head
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            content = b""
            if record.WhichOneof("record_type") == "history":
                names = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
                rows.append({name: json.loads(value) for name, value in names if value})
            if record.WhichOneof("record_type") == "run":
                run = record.run
    return rows, run


def test_wandb_offline_and_resumed(flickr, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    run_and_resume("wandb", flickr, folder, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    read = [wandb_history(file) for file in files]
    assert len(read) == 2 and len({run.run_id for _, run in read}) == 1  # one run for wandb, in two folders
    assert read[0][1].project == "image-captioning"
    assert {"model", "train"} <= {item.key for item in read[0][1].config.update}
    rows = [row for rows, _ in read for row in rows]
    table = pd.read_csv(folder / "metrics.csv")
    epochs = [row for row in rows if "epoch/valid_loss" in row]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    for name in table.columns.drop(["epoch", "stage"]):
        assert [row[f"epoch/{name}"] for row in epochs] == pytest.approx(table[name].tolist()), name
    assert [row["step"] for row in rows if "training/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(row["training/lr"]) for row in rows if "training/loss" in row)
    pictures = list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert len(pictures) >= 2 and Image.open(pictures[0]).size == (50, 40)


def test_trackio_on_this_machine_and_resumed(flickr, tmp_path):
    pytest.importorskip("trackio")
    folder, home = tmp_path / "run", str(tmp_path / "trackio")
    run_and_resume("trackio", flickr, folder, TRACKIO_DIR=home)
    code = """import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("image-captioning")
print(json.dumps([run.name, SQLiteStorage.get_logs("image-captioning", run.name)], default=str))"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRACKIO_DIR": home}
    )
    name, rows = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("run-")
    table = pd.read_csv(folder / "metrics.csv")
    assert [row["epoch/valid_loss"] for row in rows if "epoch/valid_loss" in row] == pytest.approx(
        table["valid_loss"].tolist()
    )
    assert [row["step"] for row in rows if "training/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert CAPTIONS[0] in next(row for row in rows if "samples/1" in row)["samples/1"]["caption"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    tracker = Tracker(name, tmp_path)
    tracker.begin({})
    tracker.log({"loss": 1.0}, 1)
    tracker.show([], 1)
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert f"WARNING: tracker {name}: ModuleNotFoundError" in said
    assert "pip install -r requirements-extra.txt brings it. Training goes on without it" in said


def test_a_tracker_changes_no_weight_and_one_that_fails_is_left_alone(make_trainer, tmp_path, monkeypatch, capsys):
    """One warning for all its failures."""
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    weights = []
    for name in ("none", "tensorboard", "wandb"):
        trainer = make_trainer(tmp_path / name, tracker=name, log_steps=1, epochs=1)
        trainer.run_training()
        trainer.log.tracker.finish()
        weights.append((tmp_path / name / "captioner.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert "WARNING: tracker wandb: ConnectionError: network down. Training goes on without it" in said


def test_photos_that_cannot_be_shown(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    tracker = Tracker("tensorboard", tmp_path)
    tracker.begin({})
    tracker.show([(tmp_path / "gone.jpg", "a dog", ["a dog"])], 1)
    tracker.log({"loss": 1.0}, 2)
    assert capsys.readouterr().out.count("WARNING: tracker tensorboard: FileNotFoundError") == 1


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    tracker = Tracker("tensorboard", tmp_path)
    tracker.begin({"model": {"encoder": "a|b"}})
    tracker.log({"a": math.nan, "b": math.inf, "c": 2.0, "stage": "everything"}, 1)
    tracker.finish()
    scalars, read = events(tmp_path)
    assert scalars == {"c": [(1, 2.0)]}
    assert "stage/text_summary" in read.Tags()["tensors"]


def test_a_new_run_forgets_what_an_earlier_one_left_in_its_folder(tmp_path):
    for value in (1.0, 2.0):
        tracker = Tracker("tensorboard", tmp_path)
        tracker.begin({}, first_step=0)
        tracker.log({"loss": value}, 5)
        tracker.finish()
    assert events(tmp_path)[0] == {"loss": [(5, 2.0)]}


def test_an_unknown_tracker_is_an_error(script, flickr, tmp_path):
    with pytest.raises(ValueError, match="tracker is 'wandbb', but must be one of 'none', 'tensorboard'"):
        script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path), *TINY, "--tracker", "wandbb"])
    with pytest.raises(ValueError, match="log_steps is 0, but must be at least 1"):
        script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path), *TINY, "--log_steps", "0"])


def test_another_tracker_is_another_run(tmp_path):
    state = Tracker("wandb", tmp_path).state_dict()
    for name, same in (("wandb", True), ("trackio", False)):
        tracker = Tracker(name, tmp_path)
        tracker.load_state_dict(state)
        assert (tracker.id == state["id"]) == same
    Tracker("wandb", tmp_path).load_state_dict(None)  # a state of before there were trackers
    assert not list(Path(tmp_path).iterdir())  # nothing is written before a run begins
