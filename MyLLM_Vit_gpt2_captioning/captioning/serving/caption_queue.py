"""One thread owns the model. Requests that wait while it works, and choose words alike, are its next batch: the busier
the server is, the larger are its batches, and a request that comes alone waits for nobody."""

import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from captioning.common.precision import mixed_precision
from captioning.decoding.confidence import Confidence, Judged
from captioning.decoding.search import Options, caption_batches, token_log_probabilities, trim


@dataclass
class Captioned:
    """A caption: its `ids` from BOS and prompt to EOS, if that was reached; how many of them are the prompt, BOS
    included; what the captioner's confidence says, None where it is not calibrated; where they were asked for, the
    log-probabilities of the tokens behind the prompt."""

    ids: list[int]
    prompt_length: int
    finished: bool  # with EOS
    judged: Judged | None = None
    log_probs: list[float] | None = None


@dataclass(eq=False)
class Job:
    """The photos of one request, (img_size, img_size, 3) uint8 each; `answer` becomes, for each of them, a list of
    `Captioned`, `options.num_return_sequences` of them."""

    photos: list[np.ndarray]
    prompt: str
    options: Options
    with_log_probs: bool = False
    answer: Future = field(default_factory=Future)

    def fits(self, other):
        """Whether both can be in one batch. Draws with a seed are the same every time only where nothing else is drawn
        beside them."""
        return (self.options, self.with_log_probs) == (other.options, other.with_log_probs) and (
            self.options.seed is None
        )


class CaptionQueue:
    """A context in which a thread captions the jobs that are given to `add`. When it ends, those that wait are
    captioned first.

    known: the captioner's `Confidence`, or None; batch_size: photos in a batch; `on_batch(photos, captions, seconds)`
    is called behind each batch, in the thread of the model.
    """

    def __init__(
        self,
        model,
        tokenizer,
        known: Confidence | None = None,
        batch_size=32,
        precision="auto",
        on_batch=lambda photos, captions, seconds: None,
    ):
        self.model, self.tokenizer, self.known = model, tokenizer, known
        self.batch_size, self.on_batch = batch_size, on_batch
        self.autocast, _ = mixed_precision(next(model.parameters()).device, precision)
        self._jobs, self._changed, self._closed = deque(), threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="captions", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __len__(self):
        """How many jobs wait."""
        return len(self._jobs)

    def works(self):
        """Whether jobs are taken."""
        return self._thread.is_alive()

    def add(self, job):
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def _work(self):
        while jobs := self._next_batch():
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]  # nobody waits for the others
            if not jobs:
                continue
            try:
                answers = self._caption(jobs)
            except Exception as error:  # of this batch: the next one may be fine
                traceback.print_exc(file=sys.stderr)
                answers = [error] * len(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                job.answer.set_exception(answer) if isinstance(answer, Exception) else job.answer.set_result(answer)

    def _next_batch(self):
        """-> the job that waits longest and those that can be captioned with it; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            batch, later = [self._jobs.popleft()], deque()
            room = self.batch_size - len(batch[0].photos)
            for job in self._jobs:
                if job.fits(batch[0]) and len(job.photos) <= room:
                    batch.append(job)
                    room -= len(job.photos)
                else:
                    later.append(job)
            self._jobs = later
            return batch

    def _caption(self, jobs):
        """-> for each job its answer."""
        start, first = time.perf_counter(), jobs[0]
        photos = [photo for job in jobs for photo in job.photos]
        prompts = [job.prompt for job in jobs for _ in job.photos]
        found, count = {}, first.options.num_return_sequences

        def keep(indices, levels, rows, length, pixels):
            rows_of = [Captioned(*self._trimmed(row, length)) for row in rows]
            if self.known:
                judged = self.known.judge(self.model, self.tokenizer, levels, rows, length, pixels)
                for one, of_row in zip(rows_of, judged, strict=True):
                    one.judged = of_row
            if first.with_log_probs:
                log_probs = self._log_probs(levels, rows, length)
                for one, of_row in zip(rows_of, log_probs, strict=True):
                    one.log_probs = of_row[: len(one.ids) - length]
            found.update((i, rows_of[n * count : (n + 1) * count]) for n, i in enumerate(indices))

        with self.autocast():
            batches = caption_batches(
                self.model, self.tokenizer, photos, first.options, self.batch_size, prompts, observe=keep
            )
            for _ in batches:  # what they yield is in `found`
                pass
        self.on_batch(len(photos), len(photos) * count, time.perf_counter() - start)
        in_order = iter(found[i] for i in range(len(photos)))
        return [[next(in_order) for _ in job.photos] for job in jobs]

    def _trimmed(self, row, prompt_length):
        """A row of `generate_ids` (T,) -> (ids up to the first EOS behind the prompt, `prompt_length`, whether there is
        one)."""
        eos = self.model.config.eos_token_id
        ids = trim(row, prompt_length, eos).tolist()
        return ids, prompt_length, eos in ids[prompt_length:]

    @torch.inference_mode()
    def _log_probs(self, levels, rows, prompt_length):
        states = self.model.encoder_states(levels)
        return token_log_probabilities(self.model, states, rows, prompt_length).tolist()
