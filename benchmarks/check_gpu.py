"""Is everything right and fast on this GPU? One command, eight minutes:

    python benchmarks/check_gpu.py                           all steps, to check_gpu/check_gpu.md and .json
    python benchmarks/check_gpu.py --results                 and to the section "One GPU" of benchmarks/RESULTS.md
    python benchmarks/check_gpu.py --only training graphs    some steps; --list names them
    python benchmarks/check_gpu.py --dry-run                 tiny sizes on the CPU: does the command itself work?

Weights are random, and photos and captions are made here: neither a network nor a dataset is needed. Each step is a
process with a time limit. One that fails, runs out of memory or out of time loses no other step and none of its own
finished rows, and steps that no longer fit are not run.
"""

import argparse
import codecs
import contextlib
import datetime
import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import run_all

LEAST_SECONDS = 10  # a step with less time than that is not run
GRACE = 5  # seconds between asking a process to end and ending it
NOT_RUN = "not run: no time left"


@dataclass
class Step:
    """A step is a function of gpu_right.py or gpu_fast.py with the step's name, imported in the step's own process."""

    limit: float  # seconds
    module: str
    what: str


STEPS = {  # in order of value
    "versions": Step(40, "gpu_fast", "what the device can do, attention kernels with and without cuDNN's"),
    "whole_script": Step(75, "gpu_right", "Shapes from end to end, stopped by a signal and resumed"),
    "cuda_graphs": Step(60, "gpu_right", "captions from CUDA graphs are those without, and how fast"),
    "gradients": Step(40, "gpu_right", "loss and gradients are those of the CPU"),
    "training": Step(90, "gpu_fast", "training steps with a padded head or not: ms, memory, profile, lines that wait"),
    "recipe": Step(75, "gpu_fast", "half a minute of the COCO recipe, with JPEGs made here"),
    "generation": Step(75, "gpu_fast", "greedy and beam search against Hugging Face's `generate`"),
    "hugging_face": Step(80, "gpu_fast", "training against Hugging Face, each at its best batch"),
    "ranks": Step(45, "gpu_right", "two processes on the device, and one through NCCL, learn as one without"),
    "options": Step(60, "gpu_right", "stages, self-critical, fp16, --deterministic, EMA, checkpointing, token cache"),
    "compiled": Step(140, "gpu_fast", "training steps with torch.compile, block by block and whole"),
}


# ======================================================================================================================
# A step in a process of its own
# ======================================================================================================================


def run_step(name, device, dry_run, deadline):
    """Run a step in this process. Raises SystemExit(1) where it fails."""
    warnings.simplefilter("default")
    import gpu_step
    from timing import is_out_of_memory, machine

    print(machine(), flush=True)
    try:
        step = getattr(importlib.import_module(STEPS[name].module), name)
        step(gpu_step.Setting(device, dry_run, deadline))
    except BaseException as error:
        traceback.print_exc()
        gpu_step.fail("out of memory" if is_out_of_memory(error) else gpu_step.in_one_line(error))
        sys.exit(1)


def forked_step(name, args, deadline, log):
    """Run a step in a process that was forked from one that has imported torch."""
    os.setsid()
    gc.freeze()  # collections leave alone what all steps share
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    run_step(name, args.device, args.dry_run, deadline)


class Process:
    """A step in a process group of its own, which writes to the file `log`."""

    def __init__(self, name, args, deadline, log):
        if args.fork:
            context = multiprocessing.get_context("fork")
            self.process = context.Process(target=forked_step, args=(name, args, deadline, log))
            self.process.start()
        else:
            command = [sys.executable, "-u", __file__, "--step", name, "--deadline", str(deadline)]
            command += ["--device", args.device, *(["--dry-run"] if args.dry_run else [])]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def code(self):
        """The exit code; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def end(self):
        """End it and the processes it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            until = time.monotonic() + GRACE
            while self.code() is None and time.monotonic() < until:
                time.sleep(0.05)


def follow(name, args, limit, record, write):
    """Run a step in a process, show what it prints and keep it in `record`, which `write` writes -> its result in a few
    words."""
    with tempfile.NamedTemporaryFile("wb") as log, open(log.name, "rb") as reader:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def read():
            text = decoder.decode(reader.read())
            sys.stdout.write(text)
            sys.stdout.flush()
            record["output"] += text
            return bool(text)

        start = saved = time.monotonic()
        process = Process(name, args, start + limit, log)
        try:
            while process.code() is None and time.monotonic() - start < limit:
                if read() and time.monotonic() - saved > 2:
                    saved = time.monotonic()
                    record["seconds"] = round(saved - start, 1)
                    write()
                time.sleep(0.05)
            code = process.code()
        finally:
            process.end()
            read()
    if code is None:
        return f"stopped: over its limit of {limit:.0f} s"
    failures = re.findall(r"^FAILED: (.*)", record["output"], flags=re.M)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return f"failed: {failures[0][:160]}{more}"
    return "ok" if code == 0 else f"failed: exit code {code}"


# ======================================================================================================================
# The report
# ======================================================================================================================


def tables_in(text):
    """The Markdown tables in a text, whose rows other lines may separate -> [[row, ...], ...], rows being lines."""
    lines, found = text.splitlines(), []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|"):
            if re.fullmatch(r"(\| *--- *)+\|", following):
                found.append([])
            if found:
                found[-1].append(line)
    return found


def as_rows(table):
    """Lines of a table -> [{column: cell}, ...]; a row with fewer cells lacks the last columns."""
    columns, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in table)
    return [dict(zip(columns, cells, strict=False)) for cells in rows]


def summary(records):
    """The table of all steps, as Markdown."""
    rows = "".join(f"| {r['step']} | {r['seconds']:.0f} | {r['result'].replace('|', '/')} |\n" for r in records)
    return f"| step | seconds | result |\n| --- | --- | --- |\n{rows}"


def write_report(folder, head, records):
    """Write check_gpu.md and check_gpu.json into `folder`."""
    text = f"# The check of a GPU\n\n{head}\n\n{summary(records)}"
    for record in records:
        text += (
            f"\n## {record['step']}\n\n{record['seconds']:.0f} s: {record['result']}\n\n{record['output'].strip()}\n"
        )
    rows = [record | {"tables": [as_rows(table) for table in tables_in(record["output"])]} for record in records]
    for name, content in (("check_gpu.md", text), ("check_gpu.json", json.dumps({"head": head, "steps": rows}))):
        draft = folder / f".{name}"
        draft.write_text(content, encoding="utf-8")
        draft.replace(folder / name)


def results_section(records, earlier=""):
    """A section of RESULTS.md: for each step its tables, with date, device and versions. A step that `records` lack or
    that was not run keeps its part of `earlier`, the section as it was."""
    parts = re.split(r"^### (.*)\n", earlier, flags=re.M)[1:]
    parts = dict(zip(parts[::2], parts[1::2], strict=True))
    for record in records:
        if record["result"] != NOT_RUN:
            device, *_ = [*record["output"].split("\n"), ""]
            head = f"{datetime.date.today()}, {record['seconds']:.0f} s: {record['result']}. {device}"
            parts[record["step"]] = "\n\n".join([head, *("\n".join(table) for table in tables_in(record["output"]))])
    text = "`python benchmarks/check_gpu.py --results`\n"
    for name in STEPS:
        text += f"\n### {name}\n\n{parts.get(name, 'not measured').strip()}\n"
    return text


# ======================================================================================================================
# The command
# ======================================================================================================================


def check(args):
    """Run the steps of `args` one after the other -> their records."""
    args.output.mkdir(parents=True, exist_ok=True)
    head = f"{datetime.datetime.now():%Y-%m-%d %H:%M}, device {args.device}{', dry run' if args.dry_run else ''}"
    records, deadline = [], time.monotonic() + 60 * args.minutes
    write = partial(write_report, args.output, head, records)
    for name in args.only or STEPS:
        record = dict(step=name, seconds=0.0, result=NOT_RUN, output="")
        records.append(record)
        left = deadline - time.monotonic()
        if left > LEAST_SECONDS:
            print(f"\n=== {name} ({left:.0f} s left) ===\n", flush=True)
            start, record["result"] = time.monotonic(), "running"
            write()
            limit = STEPS[name].limit * (10 if args.dry_run else 1)  # a test may share its machine
            record["result"] = follow(name, args, min(left, limit), record, write)
            record["seconds"] = round(time.monotonic() - start, 1)
        write()
    print("\n" + summary(records), flush=True)
    return records


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda; in a dry run cpu)")
    parser.add_argument("--minutes", type=float, help="for all steps together (default: 8; in a dry run 60)")
    parser.add_argument("--output", type=Path, default=Path("check_gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=list(STEPS), help="only these steps")
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--results", action="store_true", help="also write the section of benchmarks/RESULTS.md")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=math.inf, help=argparse.SUPPRESS)  # of time.monotonic()
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    args.minutes = (60 if args.dry_run else 8) if args.minutes is None else args.minutes
    args.fork = args.dry_run  # imports once for all steps: a test has to be quick
    if args.results and (args.dry_run or args.device == "cpu"):
        parser.error("--results is for what a GPU has measured")
    return args


def main(argv=None):
    """-> exit code: 0 where all steps are ok."""
    args = parse(argv)
    if args.list:
        for name, step in STEPS.items():
            print(f"{name:14s} at most {step.limit:3.0f} s  {step.what}")
        return 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # what reaches for the network fails at once
    if args.step:
        run_step(args.step, args.device, args.dry_run, args.deadline)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if args.fork:
        import timm  # noqa: F401
        from transformers import VisionEncoderDecoderModel  # noqa: F401

        import gpu_fast  # noqa: F401
        import gpu_right  # noqa: F401
    records = check(args)
    if args.results:
        run_all.write_section(
            run_all.ONE_GPU, results_section(records, run_all.read_results().get(run_all.ONE_GPU, ""))
        )
    return 0 if all(record["result"] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
