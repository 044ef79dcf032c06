"""A signal sets a flag, the loops read it: nothing raises where Python would forget it, or in the middle of a step."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest

from captioning.common import stopping
from captioning.common.stopping import SIGNALS, Stopped, listening, stop_if_asked
from captioning.data.token_cache import TokenCache
from captioning.data.workers import Loader
from captioning.training.run_state import NEWEST, read_state
from conftest import REPO_ROOT


class Collected:
    """Sends a signal when the garbage collector finds it, from the callback of a weak reference: an exception that is
    raised there is printed and forgotten."""

    def __init__(self, number):
        self.itself = self
        self.reference = None
        Collected.reference = weakref.ref(self, lambda _: signal.raise_signal(number))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(number):
    before = [signal.getsignal(known) for known in SIGNALS]
    with listening("this is how"):
        stop_if_asked()
        Collected(number)
        gc.collect()
        with pytest.raises(Stopped, match=f"stopped by {number.name}; this is how"):
            stop_if_asked()
        assert [signal.getsignal(known) for known in SIGNALS] == [signal.SIG_DFL] * len(SIGNALS)  # a second one kills
    assert [signal.getsignal(known) for known in SIGNALS] == before


def test_a_run_whose_signal_comes_while_garbage_is_collected(make_trainer, tmp_path, monkeypatch):
    """In `Trainer.clean`, behind the first epoch."""
    trainer, clean = make_trainer(tmp_path), type(make_trainer(tmp_path)).clean

    def collect():
        Collected(signal.SIGTERM)
        clean(trainer)

    monkeypatch.setattr(trainer, "clean", collect)
    with pytest.raises(Stopped, match="SIGTERM; the same command with --resume auto resumes the run"):
        trainer.run_training()
    assert len(trainer.metrics) == 1
    assert read_state(tmp_path / "last")[1]["position"]["epoch"] == 1


@pytest.mark.parametrize("part", ["validation", "scoring"])
def test_signals_beside_training(make_trainer, tmp_path, monkeypatch, part):
    """The epoch that was trained is not lost, and what is left of it is not done."""
    from captioning.scoring import evaluation

    trainer = make_trainer(tmp_path)
    if part == "validation":
        autocast = trainer.autocast

        def in_evaluation():
            if not trainer.model.training:
                signal.raise_signal(signal.SIGINT)
            return autocast()

        monkeypatch.setattr(trainer, "autocast", in_evaluation)
    else:
        batches = evaluation.caption_batches

        def signalled(*args):
            for captions in batches(*args):
                signal.raise_signal(signal.SIGINT)
                yield captions

        monkeypatch.setattr(evaluation, "caption_batches", signalled)
    with pytest.raises(Stopped):
        trainer.run_training()
    assert not trainer.metrics
    assert read_state(tmp_path / "last")[1]["position"]["batches"] == len(trainer.train_dl)


def test_a_signal_while_tokens_are_computed(script, tiny_config, dls, tmp_path, monkeypatch):
    """All tokens computed until then are kept, far fewer than lie between two points from which the work goes on."""
    tiny_config.trainable_stages = 0
    model = script.VisionGPT2Model(tiny_config).eval()
    images = list(dls[0].dataset.captions_of)
    levels, done = model.levels, []

    def signalled(batch):
        if len(done) == 2:  # the first time it is asked for their shapes
            signal.raise_signal(signal.SIGUSR1)
        done.append(len(batch))
        return levels(batch)

    monkeypatch.setattr(model, "levels", signalled)
    cache = TokenCache(tmp_path, model)
    with listening("go on"), pytest.raises(Stopped):
        cache.fill(model, images, batch_size=2)
    assert len(TokenCache(tmp_path, model).missing(images)) == len(images) - 4


def test_nobody_listens(monkeypatch):
    """Outside of `listening`, and in another thread, signals do what they did."""
    stop_if_asked()
    before = signal.getsignal(signal.SIGINT)

    def listen():
        with listening(""):
            seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, sys, time\n"
        "from captioning.common.stopping import listening\n"
        "with listening('later'):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stdout) == (-signal.SIGINT, "first\n")
    assert "SIGTERM: stopping as soon as all is saved; once more ends at once" in run.stderr


def test_one_of_several_processes_does_not_stop_by_itself(monkeypatch):
    monkeypatch.setattr(stopping, "rank_and_world_size", lambda: (1, 2))
    with listening(""):
        signal.raise_signal(signal.SIGTERM)
        stop_if_asked()
        assert stopping.asked() == "SIGTERM"


# --- data workers -----------------------------------------------------------------------------------------------------


class Signalled:
    """A dataset whose item 1 sends a signal to the worker that loads it."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i == 1:
            os.kill(os.getpid(), self.number)
        return i


def test_workers_leave_signals_to_the_main_process():
    """Ctrl-C in a terminal reaches them, too."""
    for number in SIGNALS:
        loader = Loader(Signalled(number), batch_size=None, num_workers=1)
        assert list(loader) == [0, 1, 2, 3]


HOLDS_ON_TO_A_WORKER = """
from captioning.data.workers import Loader
loader = Loader([1, 2], num_workers=1, persistent_workers=True)
batches = iter(loader)
print(next(batches))
"""


def test_workers_end_with_the_process():
    """They leave SIGTERM alone, with which multiprocessing would end them before it waits for them."""
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning")}
    command = [sys.executable, "-c", HOLDS_ON_TO_A_WORKER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tensor([1])\n", "")


def test_a_worker_that_is_killed(make_trainer, tmp_path, monkeypatch):
    """Not raised wherever the process is, but where it waits for the worker's batch; and the run is saved."""
    before = signal.getsignal(signal.SIGCHLD)
    trainer = make_trainer(tmp_path, num_workers=1)
    tokens = type(trainer.train_dl.dataset).tokens

    def killed(self, *args):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokens(self, *args)

    monkeypatch.setattr(type(trainer.train_dl.dataset), "tokens", killed)
    with pytest.raises(ChildProcessError, match=r"a process that loads photos was killed.*--num_workers N"):
        trainer.run_training()
    assert (tmp_path / "last" / NEWEST).is_file()
    assert signal.getsignal(signal.SIGCHLD) == before
