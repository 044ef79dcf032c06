"""No run loses the files of another one: in the same folder, at the same time or later, and resumed elsewhere."""

import json
import os
import shutil
import signal

import pytest

from captioning.common.files import CONFIG_FILE, WEIGHTS_FILE
from captioning.common.locks import LOCK_FILE
from captioning.common.stopping import Stopped
from captioning.training import run_folder
from captioning.training.run_state import NEWEST
from helpers.other_process import holding
from helpers.runs import TINY, assert_same_run, files, stop_after


def test_a_run_that_was_killed_in_its_first_epoch_is_set_aside(tmp_path, capsys):
    """It has states, but no checkpoint yet."""
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / NEWEST).write_text("state")
    (tmp_path / "photo.jpg").touch()  # not of a run
    os.utime(tmp_path / "last", (0, 0))
    earlier = run_folder.set_aside(tmp_path)
    assert (earlier / "last" / NEWEST).read_text() == "state"
    assert capsys.readouterr().out == f"an earlier run was moved to {earlier}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "photo.jpg"]
    assert run_folder.set_aside(tmp_path) is None


def test_two_earlier_runs_of_the_same_second(tmp_path):
    names = []
    for number in range(3):
        (tmp_path / CONFIG_FILE).write_text(str(number))
        os.utime(tmp_path / CONFIG_FILE, (0, 0))
        names.append(run_folder.set_aside(tmp_path))
    assert [name.name.partition("_")[0] for name in names] == [names[0].name.partition("_")[0]] * 3
    assert [(name / CONFIG_FILE).read_text() for name in names] == ["0", "1", "2"]


def test_the_resumed_run_alone_is_not_set_aside(tmp_path):
    (tmp_path / CONFIG_FILE).touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert run_folder.set_aside(tmp_path, resumed=tmp_path / "link") is None
    assert run_folder.set_aside(tmp_path, resumed=tmp_path / "elsewhere") is not None


@pytest.fixture
def stopped(make_trainer, tmp_path):
    """A run that was stopped in its second epoch -> its folder."""
    trainer = make_trainer(tmp_path / "a")
    stop_after(trainer, len(trainer.train_dl) + 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run_training()
    return tmp_path / "a"


@pytest.mark.parametrize("source", ["a", "a/last", "a/last/state.pt"])
def test_resumed_in_another_folder(make_trainer, stopped, tmp_path, source):
    """The best weights so far come along: it is the run that was never moved, also where nothing improves any more."""
    weights = (stopped / WEIGHTS_FILE).read_bytes()
    trainer = make_trainer(tmp_path / "b", resume=str(tmp_path / source))
    trainer.log.is_best = lambda: False
    assert trainer.run_training()["best_epoch"] == 0
    assert (tmp_path / "b" / WEIGHTS_FILE).read_bytes() == weights == (stopped / WEIGHTS_FILE).read_bytes()
    trainer.load_best_model()
    assert json.loads((tmp_path / "b" / CONFIG_FILE).read_text())["best_epoch"] == 0
    moved = make_trainer(tmp_path / "c", resume=str(tmp_path / source))
    result = moved.run_training()
    stayed = make_trainer(stopped, resume="auto")
    assert_same_run(moved, result, tmp_path / "c", (stayed.run_training(), files(stopped), stayed.model.state_dict()))


def test_a_state_without_the_best_weights(make_trainer, stopped, tmp_path):
    shutil.copytree(stopped / "last", tmp_path / "b" / "last")
    with pytest.raises(FileNotFoundError, match=r"captioner\.safetensors: not found; .* --resume the folder with all"):
        make_trainer(tmp_path / "c", resume=str(tmp_path / "b")).run_training()
    assert not (tmp_path / "c" / "last").exists()


def test_the_command_resumes_elsewhere_and_overwrites_nothing(script, flickr, tmp_path, monkeypatch, capsys):
    """A new folder, and one with another run in it, which is moved aside."""
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "no_data")
    command = ["--data_dir", str(flickr), *TINY, "--score_every", "0", "--demo_images", "0"]
    a, b = tmp_path / "a", tmp_path / "new" / "b"
    script.main([*command, "--model_path", str(a), "--epochs", "1"])
    script.main([*command, "--model_path", str(b), "--epochs", "1", "--seed", "1"])
    other, best = (b / WEIGHTS_FILE).read_bytes(), (a / WEIGHTS_FILE).read_bytes()
    capsys.readouterr()
    script.main([*command, "--model_path", str(b), "--epochs", "1", "--resume", str(a)])
    assert "an earlier run was moved to" in capsys.readouterr().out
    assert (b / WEIGHTS_FILE).read_bytes() == best == (a / WEIGHTS_FILE).read_bytes()
    [earlier] = (b / "earlier").iterdir()
    assert (earlier / WEIGHTS_FILE).read_bytes() == other
    script.main([*command, "--model_path", str(tmp_path / "c" / "c"), "--epochs", "1", "--resume", str(a)])
    assert (tmp_path / "c" / "c" / WEIGHTS_FILE).read_bytes() == best


def test_two_runs_in_one_folder(script, flickr, tmp_path, monkeypatch):
    """The second one is refused, and has touched nothing."""
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "no_data")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG_FILE).write_text("of the first run")
    with (
        holding(tmp_path / "a" / LOCK_FILE) as first,
        pytest.raises(BlockingIOError, match=f"a: process {first.pid} on .* is writing there; wait for it, or choose"),
    ):
        script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path / "a"), *TINY])
    assert (tmp_path / "a" / CONFIG_FILE).read_text() == "of the first run"
