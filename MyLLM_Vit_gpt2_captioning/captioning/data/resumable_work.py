"""Work on many files that survives being killed: each finished item gets a line in an index file, and the next run does
only the items without one. The line is written once the item itself is complete.
"""

import json
from functools import partial

import torch.utils.data

from captioning.common.files import write_atomically
from captioning.common.progress import progress_bar
from captioning.common.stopping import stop_if_asked
from captioning.data.workers import Loader


def read_index(path):
    """An index file -> list of its entries (JSON values) in front of the first damaged or incomplete line; empty when
    there is no such file."""
    entries = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            entries.append(json.loads(line if line.endswith(b"\n") else ""))
        except (ValueError, RecursionError):
            break
    return entries


def open_index(path, entries):
    """Start an index file anew with `entries`, those that `read_index` returned and that still count -> the file, open
    for `add_entries`."""
    write_atomically(path, lambda draft: draft.write_text(_as_lines(entries)))
    return path.open("a")


def add_entries(index, *entries):
    """Append entries to an index file and hand them to the operating system, so that a killed process keeps them."""
    index.write(_as_lines(entries))
    index.flush()


def _as_lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


class Jobs(torch.utils.data.Dataset):
    """Item i is function(jobs[i]).

    A `Dataset`, because a DataLoader's workers are processes that end with the one that started them, however it ends.
    """

    def __init__(self, function, jobs):
        self.function, self.jobs = function, jobs

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, i):
        return self.function(self.jobs[i])


def run_jobs(function, jobs, num_workers, title, images_of=lambda job: 1, prefetch=2):
    """Yields (job, function(job)) in the order of `jobs`, computed by worker processes (0: by this one), beside a
    progress bar. An OSError or ValueError of the function is raised here, without the traceback of the worker; Stopped
    behind a job, as in `stop_if_asked`.

    `images_of(job)`: what a job adds to the bar; `prefetch`: jobs that each worker is given in advance.
    """
    num_workers = min(num_workers, len(jobs))
    loader = Loader(
        Jobs(partial(_result_or_error, function), jobs),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
    )
    bar = progress_bar(sum(map(images_of, jobs)), title)
    try:
        for job, result in zip(jobs, loader, strict=True):
            if isinstance(result, Exception):
                raise result
            yield job, result
            bar.update(images_of(job))
            stop_if_asked()
    finally:
        bar.close()


def _result_or_error(function, job):
    try:
        return function(job)
    except (OSError, ValueError) as error:
        return error
