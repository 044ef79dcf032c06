"""--sweep lr=1e-4,3e-4 seed=0,1,2: a run for every combination, one after the other, and the page that compares them.

Every run is a process of its own with a folder of its own below model_path, so it is the same run as without a sweep.
The same command goes on after a stop: it skips finished runs and resumes the one that was stopped.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import tomllib

from captioning.command_line.recipes import as_toml
from captioning.common import stopping
from captioning.common.distributed import rank_and_world_size
from captioning.common.files import RECIPE_FILE
from captioning.training.compared_runs import PAGE, WITHOUT_EFFECT, read_runs, write_comparison
from captioning.training.run_folder import STATES

FILLED_IN = {"vocab_size", "eos_token_id", "unk_token_id", "coupling"}  # by a run, from its tokenizer and encoder
POLL = 0.2  # seconds between looks at a run


def run(argv, script, read_configs):
    """Run the sweep in `argv`, the command line of the `script` -> whether there is one.

    `read_configs(argv)` -> (model config, train config, ...) of one run, or an error for constants that are wrong; all
    are read before the first run begins. Raises ValueError for a sweep that cannot be run, Stopped when a signal or a
    run has stopped it, with all states saved; ends the program with status 1 when runs have failed, after all others.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sweep", nargs="+", metavar="CONSTANT=VALUE,VALUE")
    given, rest = parser.parse_known_args(argv)
    if not given.sweep:
        return False
    if rank_and_world_size()[1] > 1:
        raise ValueError("--sweep starts runs of one process: start it without torchrun")
    common = read_configs(rest)[1]
    if common.resume:
        raise ValueError(f"--sweep resumes the run that was stopped by itself: leave --resume {common.resume} out")
    parent = common.model_path
    runs = {parent / name: [*rest, *options] for name, options in combinations(given.sweep).items()}
    for folder, options in runs.items():
        with contextlib.redirect_stdout(io.StringIO()):  # notices, which the run itself prints
            check_folder(folder, *read_configs(options)[:2])
    failed = []
    with stopping.listening("the same command goes on with the sweep"):
        for number, (folder, options) in enumerate(runs.items(), 1):
            if is_finished(folder):
                print(f"sweep, run {number} of {len(runs)}: {folder} is finished", flush=True)
                continue
            print(f"sweep, run {number} of {len(runs)}: {folder}", flush=True)
            resume = ["--resume=auto"] if any((folder / STATES).glob("*.pt")) else []
            status = _run_one([sys.executable, script, *options, f"--model_path={folder}", *resume])
            stopping.stop_if_asked()
            if status == 0 and not is_finished(folder):
                raise stopping.Stopped(f"{folder} was stopped; the same command goes on with the sweep")
            failed += [folder] * (status != 0)
    compared, left_out = read_runs(runs)
    for line in left_out:
        print(f"left out: {line}")
    if compared:
        print(f"\n{write_comparison(compared, parent / PAGE)}\n\nthe page: {parent / PAGE}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed, see above: {', '.join(map(str, failed))}")
    return True


def combinations(words):
    """["lr=1e-4,3e-4", "seed=0,1"] -> {a run's folder: its options}. Raises ValueError for what is no sweep."""
    axes = {}
    for word in words:
        key, equals, values = word.partition("=")
        key, values = key.removeprefix("--").replace("-", "_"), values.split(",")
        if not equals or not key or "" in values:
            raise ValueError(f"--sweep {word}: give a constant and its values, as in lr=1e-4,3e-4")
        if key in ("model_path", "resume"):
            raise ValueError(f"--sweep {word}: the sweep itself chooses {key}")
        if key in axes or len(set(values)) < len(values):
            raise ValueError(f"--sweep {word}: {key} or one of its values comes twice")
        axes[key] = values
    found = {}
    for values in itertools.product(*axes.values()):
        name = "_".join(re.sub(r"[^\w.+-]", "-", f"{key}_{value}") for key, value in zip(axes, values, strict=True))
        if name in found:
            raise ValueError(
                f"--sweep {' '.join(words)}: two runs would have the folder {name}; rename one of the values"
            )
        found[name] = [f"--{key}={value}" for key, value in zip(axes, values, strict=True)]
    return found


def is_finished(folder):
    """Whether a run has come to its end: it draws its curves last."""
    return (folder / "loss.png").is_file()


def check_folder(folder, model_config, train_config):
    """Raises ValueError for a run with other constants in `folder`: it would be taken for one of the sweep."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    try:
        there = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); move the folder away") from error
    asked = tomllib.loads(as_toml(model_config=model_config, train_config=train_config))
    names = (there.keys() | asked.keys()) - WITHOUT_EFFECT - FILLED_IN
    if other := sorted(name for name in names if there.get(name) != asked.get(name)):
        shown = ", ".join(f"{name} {there.get(name)}, not {asked.get(name)}" for name in other[:3])
        raise ValueError(f"{folder}: a run with other constants is there ({shown}); choose another --model_path")


def _run_one(command):
    """Run a command to its end -> its exit status. A signal that asks to stop is handed on to it, once: it has a
    session of its own, because the terminal's Ctrl-C would reach it a second time, and end it without saving."""
    environment = os.environ | {"MPLBACKEND": "agg"}  # no windows, which would wait for somebody to close them
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    asked = False
    while True:
        try:
            return process.wait(POLL)
        except subprocess.TimeoutExpired:
            if stopping.asked() and not asked:
                process.send_signal(getattr(signal, stopping.asked()))
                asked = True
