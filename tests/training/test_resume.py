"""A run that was stopped goes on as if it had not been: bit for bit, whatever stopped it."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from captioning.common.stopping import SIGNALS, Stopped
from captioning.training import run_state
from captioning.training.run_state import NEWEST, read_state, restore_rng, rng_state, write_state
from conftest import REPO_ROOT, TINY_ENCODER, make_flickr, script_module, tiny_model_of, tiny_training_of, trainers_of
from helpers.runs import assert_same_run, change_loss, files, stop_after

SCRIPT = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "MyLLM_Vit_gpt2_captioning.py"


@pytest.fixture(scope="module")
def whole(bpe, tmp_path_factory):
    """Of an uninterrupted run: its result, files and last weights."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_flickr(folder / "data")
    make_trainer = trainers_of(script_module, tiny_model_of(bpe), tiny_training_of(data, folder), bpe)
    trainer = make_trainer(folder / "run")
    result = trainer.run_training()
    return result, files(folder / "run"), trainer.model.state_dict()


@pytest.mark.parametrize(
    "reason", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, RuntimeError("CUDA out of memory")], ids=str
)
def test_a_stopped_run_goes_on_bit_for_bit(make_trainer, whole, tmp_path, reason, capsys):
    """In the middle of the second epoch, near its end, and again: three stops of one run."""
    folder, before = tmp_path / "stopped", [signal.getsignal(number) for number in SIGNALS]
    steps = len(make_trainer(folder).train_dl)
    for stop in (steps + 2, steps - 2, 1):
        trainer = make_trainer(folder, resume="auto")
        stop_after(trainer, stop, reason)
        with pytest.raises(Stopped if isinstance(reason, signal.Signals) else RuntimeError):
            trainer.run_training()
        torch.rand(7)  # a new process has drawn other random numbers by now
    trainer = make_trainer(folder, resume="auto")
    assert f"resuming {folder / 'last' / NEWEST}: epoch " in capsys.readouterr().out
    assert_same_run(trainer, trainer.run_training(), folder, whole)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_resume_in_self_critical_training(make_trainer, tmp_path):
    changes = dict(epochs=1, scst_epochs=2, scst_lr=1e-3, scst_samples=3)
    results = []
    for stops in ((), (1, 3)):  # steps of the self-critical stage, which has a schedule of its own
        folder = tmp_path / str(len(stops))
        for stop in stops:
            trainer = make_trainer(folder, resume="auto", **changes)
            start = trainer.start_self_critical

            def then_stop(start=start, trainer=trainer, stop=stop):
                start()
                stop_after(trainer, stop, signal.SIGTERM)

            trainer.start_self_critical = then_stop
            if trainer.objective is trainer.self_critical:
                stop_after(trainer, stop, signal.SIGTERM)
            with pytest.raises(Stopped):
                trainer.run_training()
        trainer = make_trainer(folder, resume="auto", **changes)
        results.append((trainer.run_training(), files(folder)))
    assert results[0] == results[1]


def test_stop_during_validation(make_trainer, whole, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    trainer = make_trainer(folder)
    monkeypatch.setattr(trainer, "valid_one_epoch", lambda epoch: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        trainer.run_training()
    trainer = make_trainer(folder, resume="auto")
    assert trainer.state.position["batches"] == len(trainer.train_dl)
    assert_same_run(trainer, trainer.run_training(), folder, whole)


def test_damaged_states(make_trainer, tmp_path, capsys):
    """The one before serves; with none left nothing is started silently."""
    trainer = make_trainer(tmp_path)
    trainer.run_training()
    newest, before = tmp_path / "last" / NEWEST, tmp_path / "last" / run_state.BEFORE
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert make_trainer(tmp_path, resume="auto").state.position["epoch"] == 2
    assert f"WARNING: {newest} is damaged" in capsys.readouterr().out
    newest.write_bytes(content[: len(content) // 2])
    assert read_state(tmp_path / "last")[0] == before
    newest.unlink()  # a crash between the two renames
    assert read_state(tmp_path / "last")[0] == before
    before.write_bytes(b"")
    with pytest.raises(ValueError, match="every state of the run is damaged; leave out --resume"):
        make_trainer(tmp_path, resume="auto")


def test_a_pickle_is_not_executed(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"position": Evil()}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="damaged"):
        read_state(tmp_path)
    assert not (tmp_path / "executed").exists()


DAMAGES = {
    "{}": lambda state: state.clear(),
    "an epoch of -7": lambda state: state["position"].update(epoch=-7),
    "a position that is text": lambda state: state.update(position="x"),
    "another format": lambda state: state.update(format=99),
    "no processes": lambda state: state.update(shares=0),
    "no best": lambda state: state.pop("best"),
    "no optimizer": lambda state: state["optimization"].pop("optimizer"),
    "weights of another shape": lambda state: state["model"].update({"gpt.tok_emb.weight": torch.zeros(3, 3)}),
    "random numbers that are none": lambda state: state["rng"].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "metrics that are text": lambda state: state.update(metrics=3),
}


@pytest.fixture(scope="module")
def state_of_a_run(whole, bpe, tmp_path_factory):
    """-> (the state of a run that was stopped, its data)."""
    folder = tmp_path_factory.mktemp("damaged")
    data = make_flickr(folder / "data")
    trainer = trainers_of(script_module, tiny_model_of(bpe), tiny_training_of(data, folder), bpe)(folder / "run")
    stop_after(trainer, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run_training()
    return folder / "run" / "last" / NEWEST, data


@pytest.mark.parametrize("damage", DAMAGES)
def test_states_that_are_none(script, bpe, state_of_a_run, tmp_path, damage):
    """One line that names the file, never a traceback, and nothing is trained."""
    path, data = state_of_a_run
    state = torch.load(path, weights_only=True)
    DAMAGES[damage](state)
    torch.save(state, tmp_path / NEWEST)
    make = trainers_of(script, tiny_model_of(bpe), tiny_training_of(data, tmp_path), bpe)
    with pytest.raises(ValueError, match=r"^[^\n]*(is damaged; leave out --resume|has format 99|not the state)[^\n]*$"):
        make(tmp_path / "run", resume=str(tmp_path / NEWEST))


def test_weights_are_no_state(make_trainer, tmp_path):
    make_trainer(tmp_path / "run").save_model()
    for name, said in (("captioner.safetensors", "--start_from"), ("captioner.pt", "not the state of a run")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            make_trainer(tmp_path / "other", resume=str(tmp_path / "run" / name))


def test_photos_that_have_changed_are_said(script, bpe, state_of_a_run, tmp_path, capsys):
    path, data = state_of_a_run
    copy = shutil.copytree(data, tmp_path / "data")
    make = trainers_of(script, tiny_model_of(bpe), tiny_training_of(copy, tmp_path), bpe)
    make(tmp_path / "run", resume=str(path))
    assert "pixels" not in capsys.readouterr().out
    copy = shutil.copytree(data, tmp_path / "changed")
    with open(copy / "flickr30k_images" / "1001.jpg", "ab") as file:
        file.write(b"more")
    make = trainers_of(script, tiny_model_of(bpe), tiny_training_of(copy, tmp_path), bpe)
    make(tmp_path / "run", resume=str(path))
    assert "WARNING: files of the training photos have changed" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["auto", "elsewhere/last", "no/state.pt"])
def test_nothing_to_go_on_from(make_trainer, tmp_path, capsys, source):
    trainer = make_trainer(tmp_path, resume=source if source == "auto" else str(tmp_path / source))
    assert "TRAINING STARTS FROM THE BEGINNING" in capsys.readouterr().out
    assert not trainer.state.resumed


def test_changes(make_trainer, tmp_path, capsys):
    """Another model, other data or batches would be another run; rate and length may change, and say so."""
    trainer = make_trainer(tmp_path)
    stop_after(trainer, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run_training()
    with pytest.raises(ValueError) as refused:
        make_trainer(tmp_path, resume="auto", batch_size=2, depth=1, seed=1)
    for line in (
        "model.depth: it was 2, now it is 1",
        "train.batch_size: it was 4, now it is 2",
        "train.seed: it was 0",
    ):
        assert line in str(refused.value)
    captions = trainer.train_dl.dataset.captions
    other = make_trainer(tmp_path)
    other.train_dl.dataset.captions = [*captions[:-1], "another"]
    with pytest.raises(ValueError, match="training captions: they were 16, and not the same as now"):
        other.state.resume("auto", other.identity(), [])
    capsys.readouterr()
    changed = make_trainer(tmp_path, resume="auto", lr=5e-4, epochs=4)
    out = capsys.readouterr().out
    assert "changed since the run stopped: lr was 0.001, now it is 0.0005" in out
    assert "epochs was 3, now it is 4" in out
    fresh = make_trainer(tmp_path / "fresh", lr=5e-4, epochs=4)
    for _ in range(2):
        fresh.optimizer.step()
        fresh.scheduler.step()
    assert changed.scheduler.get_last_lr() == pytest.approx(fresh.scheduler.get_last_lr())
    changed.run_training()
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 4


def test_states_are_saved_in_time(make_trainer, tmp_path, monkeypatch):
    """Every `save_minutes`, and after every epoch; the clock of the run is in a table of its own."""
    monkeypatch.setattr(run_state.time, "monotonic", iter(range(10_000)).__next__)
    saved = []
    for minutes in (1e9, 2 / 60):
        trainer = make_trainer(tmp_path / str(minutes), save_minutes=minutes)
        save = trainer.state.save
        monkeypatch.setattr(trainer.state, "save", lambda content, save=save: saved.append(1) or save(content))
        trainer.run_training()
        saved.append(0)
    assert saved.index(0) == 3
    assert sum(saved) - 3 > 3 + 2
    timings = pd.read_csv(tmp_path / str(minutes) / "timings.csv")
    assert list(timings) == ["epoch", "training", "evaluation", "captions"]
    assert timings["epoch"].tolist() == [1, 2, 3]


def test_a_state_that_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "write_state", full)
    trainer = make_trainer(tmp_path)
    trainer.run_training()
    assert "the state of the run cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().out
    assert (tmp_path / "captioner.safetensors").is_file()


def test_write_state_keeps_the_last_two(tmp_path):
    for number in range(3):
        write_state(tmp_path, {"number": number})
    assert read_state(tmp_path / NEWEST)[1] == {"number": 2}
    assert read_state(tmp_path / run_state.BEFORE)[1] == {"number": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NEWEST, run_state.BEFORE])


def test_random_numbers(tmp_path):
    import numpy as np

    np.random.standard_normal()  # one of a pair: the other one is part of the state
    state = rng_state()
    drawn = [random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()]
    torch.save(state, tmp_path / "rng.pt")
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert drawn == [random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()]


def test_non_finite_losses_leave_a_state(make_trainer, tmp_path, monkeypatch):
    """The last good one: going on with a lower rate starts at the step that failed."""
    trainer = make_trainer(tmp_path, max_bad_steps=2)
    change_loss(trainer, monkeypatch, lambda loss: loss * (math.nan if trainer.scheduler.last_epoch else 1))
    with pytest.raises(FloatingPointError):
        trainer.run_training()
    trainer = make_trainer(tmp_path, resume="auto", lr=1e-4)
    assert trainer.scheduler.last_epoch == 1
    assert trainer.run_training()["best_epoch"] is not None


def test_deterministic(make_trainer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    make_trainer(tmp_path)
    assert not calls
    make_trainer(tmp_path, deterministic=True)
    assert calls == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_cudnn_searches_for_convolutional_encoders(make_trainer, tmp_path, monkeypatch):
    """And only in runs that need not be the same every time."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cnn = dict(encoder="resnet10t", encoder_options={"img_size": 64})
    for options, searches in (({}, False), (cnn, True), (cnn | {"deterministic": True}, False)):
        make_trainer(tmp_path, **options)
        assert torch.backends.cudnn.benchmark == searches


# --- killed processes -------------------------------------------------------------------------------------------------

SCENES = 100
COMMAND = [
    sys.executable, str(SCRIPT), "--recipe", "shapes", "--epochs", "2", "--shapes_scenes", str(SCENES),
    "--batch_size", "8", "--embed_dim", "32", "--num_heads", "2", "--encoder_options", json.dumps(TINY_ENCODER),
    "--score_every", "0", "--demo_images", "1", "--save_minutes", "0.002", "--ema_decay", "0.9",
    "--freeze_epochs_all", "0",
]  # fmt: skip


def train(folder, data, *options, **kwargs):
    command = [*COMMAND, "--data_dir", str(data), "--model_path", str(folder), *options]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


def wait_for_a_state(run, folder):
    while not (folder / "last" / NEWEST).exists() and run.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGKILL], pytest.param(SIGNALS, marks=pytest.mark.skipif("SOAK" not in os.environ, reason="long"))],
)
def test_killed_at_random_moments(tmp_path, signals):
    """Killed or stopped by signals, resumed each time: weights and metrics are those of the uninterrupted run, and one
    that a signal stopped says that it can be resumed. KILLS says how often: `make soak` makes it 20."""
    from captioning.data import shapes

    kills, rng = int(os.environ.get("KILLS", 1)), random.Random(int(os.environ.get("KILL_SEED", 0)))
    data, whole, killed = tmp_path / "shapes", tmp_path / "whole", tmp_path / "killed"
    shapes.write_dataset(data, SCENES)
    start = time.monotonic()
    run = train(whole, data)
    wait_for_a_state(run, whole)
    begun = time.monotonic() - start
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    length, done = time.monotonic() - start, 0
    while done < kills:
        run = train(killed, data, "--resume", "auto")
        if (killed / "last").exists():  # while it resumes or trains, counted from its start
            delay = rng.uniform(0.8 * begun, (begun + length) / 2)
        else:  # behind its first state: before that there is nothing to lose
            wait_for_a_state(run, killed)
            delay = rng.uniform(0, (length - begun) / 2)
        try:
            out, _ = run.communicate(timeout=delay)
            assert run.returncode == 0, out  # it was done before it could be killed: once more from the start
            shutil.rmtree(killed)
        except subprocess.TimeoutExpired:
            number = rng.choice(signals)
            run.send_signal(number)
            out, _ = run.communicate(timeout=600)
            done += 1
            saved = run.returncode == 0 and (f"stopped by {number.name}; " in out or "checkpoint and plots" in out)
            # Before it trains there is nothing to save, and a signal ends it as any program.
            assert saved or run.returncode == -number or out.rstrip().endswith("interrupted"), out
            assert read_state(killed / "last")[1] is not None
            print(f"{number.name} {done} after {delay:.1f} s: {'saved' if saved else 'ended at once'}")
    run = train(killed, data, "--resume", "auto")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert "resuming" in out
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    ours, theirs = load_file(killed / "captioner.safetensors"), load_file(whole / "captioner.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sigterm_ends_a_process_cleanly(tmp_path):
    from captioning.data import shapes

    shapes.write_dataset(tmp_path / "shapes", SCENES)
    run = train(tmp_path / "run", tmp_path / "shapes")
    wait_for_a_state(run, tmp_path / "run")
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0, out
    assert "stopped by SIGTERM; the same command with --resume auto resumes the run" in out
    assert read_state(tmp_path / "run" / "last")[1] is not None


@pytest.mark.skipif("SOAK" not in os.environ, reason="takes minutes: make soak")
def test_memory_stays_flat(tmp_path):
    """2,000 training steps, then 500 captions: after a warm-up the process grows by less than 2%."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import MyLLM_Vit_gpt2_captioning as script

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024

argv = ["--recipe", "shapes", "--epochs", "50", "--batch_size", "8", "--data_dir", {str(tmp_path / "shapes")!r},
        "--shapes_scenes", "800", "--model_path", {str(tmp_path / "run")!r}, "--score_every", "0"]
script.shapes.write_dataset(script.Path({str(tmp_path / "shapes")!r}), 800)
model_cfg, train_cfg, _ = script.read_configs(argv)
trainer = script.build_trainer(model_cfg, train_cfg, script.load_data(train_cfg, script.DATA_DIR))
sizes, steps = [], 0
for epoch in range(50):
    trainer.train_one_epoch(epoch)
    steps += len(trainer.train_dl)
    sizes.append(resident())
    if steps >= 2000:
        break
photos = trainer.valid_dl.dataset.images
after = []
for number in range(500):
    trainer.generate_caption(photos[number % len(photos)], deterministic=True)
    after.append(resident())
print("RESULT", steps, sizes[len(sizes) // 5], sizes[-1], after[50], after[-1])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=1800)
    steps, warm, end, first, last = map(int, run.stdout.split("RESULT ")[1].split())
    print(f"{steps} steps: {warm} MiB after the warm-up, {end} at the end; 500 captions: {first} MiB, {last}")
    assert steps >= 2000
    assert end < 1.02 * warm
    assert last < 1.02 * first
