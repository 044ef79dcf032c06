"""--sweep: a run for every combination. A stand-in for the script writes the files of a run at once."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from captioning.common.stopping import Stopped
from captioning.training import sweep

STAND_IN = '''
"""Writes the files of a run of one epoch. lr 9: fails. lr 7: waits for SIGTERM the first time, and saves its state."""
import pathlib, signal, sys, time
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(options["model_path"])
with open(folder.parent / "log", "a") as log:
    print(folder.name, options.get("resume", "new"), file=log)
folder.mkdir(exist_ok=True)
if options["lr"] == "9":
    sys.exit(1)
constants = f"lr = {float(options['lr'])}\\nseed = {options['seed']}\\nepochs = 1\\n"
(folder / "recipe.toml").write_text(constants)
if options["lr"] == "7" and "resume" not in options:
    def stop(*_):
        (folder / "last").mkdir()
        (folder / "last" / "state.pt").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (folder / "waiting").touch()
    time.sleep(60)
(folder / "metrics.csv").write_text("epoch,stage,valid_loss,valid_perplexity\\n1,all,1.0,2.7\\n")
(folder / "loss.png").touch()
'''


@pytest.fixture
def start(tmp_path):
    """-> a function that runs a sweep with the stand-in -> [name of a folder, and whether its run was resumed]."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def read_configs(argv):
        values = dict(word.removeprefix("--").split("=", 1) for word in argv)
        train = SimpleNamespace(lr=float(values.get("lr", 1)), seed=int(values.get("seed", 0)), epochs=1)
        train.model_path, train.resume = tmp_path / "runs", ""
        return SimpleNamespace(), train, False

    def start(*words):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / "log").write_text("")
        assert sweep.run(["--sweep", *words], str(tmp_path / "stand_in.py"), read_configs)
        return started(tmp_path)

    return start


def started(tmp_path):
    return (tmp_path / "runs" / "log").read_text().splitlines()


def test_every_combination_in_a_folder_of_its_own_and_the_page(start, tmp_path, capfd):
    names = ["lr_1e-4_seed_0", "lr_1e-4_seed_1", "lr_3e-4_seed_0", "lr_3e-4_seed_1"]
    assert start("lr=1e-4,3e-4", "seed=0,1") == [f"{name} new" for name in names]
    printed = capfd.readouterr().out
    assert "lr 0.0003     1" in printed and "2.700 (2.700 to 2.700)" in printed
    assert (tmp_path / "runs" / "compared_runs.html").is_file()
    assert start("lr=1e-4,3e-4", "seed=0,1") == [], "finished runs are skipped"
    assert start("lr=1e-4,3e-4", "seed=0,1,2") == ["lr_1e-4_seed_2 new", "lr_3e-4_seed_2 new"]


def test_a_stopped_sweep_goes_on(start, tmp_path):
    """A signal reaches the run that is going on, which saves its state; the same command resumes that run alone."""

    def interrupt():
        while not (tmp_path / "runs" / "lr_7_seed_0" / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on with the sweep"):
        start("lr=1,7,2", "seed=0")
    thread.join()
    assert started(tmp_path) == ["lr_1_seed_0 new", "lr_7_seed_0 new"]
    assert start("lr=1,7,2", "seed=0") == ["lr_7_seed_0 auto", "lr_2_seed_0 new"]


def test_a_run_that_fails_does_not_end_the_sweep(start, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: 1 of 2 runs failed, see above: .*lr_9_seed_0$"):
        start("lr=9,2", "seed=0")
    assert started(tmp_path) == ["lr_9_seed_0 new", "lr_2_seed_0 new"]
    assert (tmp_path / "runs" / "compared_runs.html").is_file()


def test_another_run_in_the_folder_is_not_taken_for_one_of_the_sweep(start, tmp_path):
    start("lr=1", "seed=0")
    (tmp_path / "runs" / "lr_1_seed_0" / "recipe.toml").write_text("lr = 1.0\nseed = 0\nepochs = 5\n")
    with pytest.raises(ValueError, match=r"a run with other constants is there \(epochs 5, not 1\); choose another"):
        start("lr=2,1", "seed=0")
    assert started(tmp_path) == [], "said before the first run begins"


def test_what_a_run_fills_in_is_no_other_constant(start, tmp_path):
    """Its recipe has the tokenizer's and the encoder's values, and a folder of its own."""
    start("lr=1", "seed=0")
    recipe = tmp_path / "runs" / "lr_1_seed_0" / "recipe.toml"
    filled_in = 'vocab_size = 329\neos_token_id = 0\ncoupling = "final"\nmodel_path = "elsewhere"\n'
    recipe.write_text(recipe.read_text() + filled_in)
    assert start("lr=1", "seed=0") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "--sweep lr: give a constant and its values, as in lr=1e-4,3e-4"),
        (["lr=1,"], "--sweep lr=1,: give a constant"),
        (["model_path=a,b"], "--sweep model_path=a,b: the sweep itself chooses model_path"),
        (["lr=1,2", "lr=3"], "--sweep lr=3: lr or one of its values comes twice"),
        (["seed=1,1"], "seed or one of its values comes twice"),
        (["encoder=a/b,a-b"], "two runs would have the folder encoder_a-b; rename one of the values"),
    ],
)
def test_what_is_no_sweep_is_one_line(words, message):
    with pytest.raises(ValueError) as error:
        sweep.combinations(words)
    assert message in str(error.value)


def test_without_a_sweep_the_script_trains(script):
    assert sweep.run(["--lr", "1"], "", script.read_configs) is False


def test_constants_are_checked_before_the_first_run(script, tmp_path):
    """By the script itself, as those of a single run are."""
    argv = ["--model_path", str(tmp_path / "runs"), "--recipe", "shapes", "--sweep", "lr=1e-4,-1"]
    with pytest.raises(ValueError, match="lr"):
        sweep.run(argv, "no script", script.read_configs)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_resumes_by_itself(script):
    """All its runs would go on from one and the same state."""
    with pytest.raises(ValueError, match="leave --resume auto out"):
        sweep.run(["--recipe", "shapes", "--resume", "auto", "--sweep", "seed=0,1"], "no script", script.read_configs)


def test_one_run_is_given_no_sweep(script, capsys):
    with pytest.raises(SystemExit):
        script.read_configs(["--sweep", "lr=1,2"])
    assert "--sweep is for the command line of the script" in capsys.readouterr().err
