"""Which requests share a batch, and that the captions are the same as without one."""

import numpy as np
import pytest
import torch

from captioning.decoding.search import Options, caption_images, log_probabilities
from captioning.serving.caption_queue import CaptionQueue, Job

GREEDY, BEAMS = Options(deterministic=True, max_tokens=8), Options(num_beams=3, num_return_sequences=2, max_tokens=8)


@pytest.fixture
def photos():
    return list(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))


def batches_of(queue, jobs):
    """What the thread of the model would take, one batch after the other."""
    for job in jobs:
        queue.add(job)
    while len(queue):
        yield [jobs.index(job) for job in queue._next_batch()]


def test_the_oldest_and_those_like_it_are_a_batch(tiny_model, bpe, photos):
    queue = CaptionQueue(tiny_model, bpe, batch_size=4)
    jobs = [
        Job(photos[:1], "", GREEDY),
        Job(photos[:1], "", BEAMS),
        Job(photos[:3], "a red", GREEDY),
        Job(photos[:1], "", GREEDY, with_log_probs=True),
        Job(photos[:1], "", GREEDY),  # there is no room for it
        Job(photos[:1], "", BEAMS),
        Job(photos[:6], "", GREEDY),  # more than a batch
    ]
    assert list(batches_of(queue, jobs)) == [[0, 2], [1, 5], [3], [4], [6]]


def test_draws_with_a_seed_are_alone(tiny_model, bpe, photos):
    seeded, free = (Options(temperature=2.0, seed=seed) for seed in (1, None))
    jobs = [Job(photos[:1], "", options) for options in (seeded, seeded, free, free)]
    assert list(batches_of(CaptionQueue(tiny_model, bpe), jobs)) == [[0], [1], [2, 3]]


def test_captions_are_those_without_a_queue(tiny_model, bpe, photos):
    """Of photos and prompts of different lengths, in one batch or several; what waits is captioned when it ends."""
    seen = []
    for options in (GREEDY, BEAMS):
        arguments = dict(vars(options))
        alone = [caption_images(tiny_model, bpe, [photo], prompt="", **arguments) for photo in photos[:4]]
        begun = caption_images(tiny_model, bpe, photos[4:5], prompt="a red", **arguments)
        jobs = [Job(photos[:2], "", options), Job(photos[2:4], "", options), Job(photos[4:5], "a red", options)]
        with CaptionQueue(tiny_model, bpe, batch_size=3, on_batch=lambda *batch: seen.append(batch[:2])) as queue:
            for job in jobs:
                queue.add(job)
        found = [found for job in jobs for found in job.answer.result(0)]
        texts = [[bpe.decode(one.ids[1:]).strip() for one in captions] for captions in found]
        expected = [captions[0] for captions in (*alone, begun)]
        assert texts == (expected if options is BEAMS else [[caption] for caption in expected])
        assert not queue.works()
    assert sum(photos for photos, _ in seen) == 10
    assert sum(captions for _, captions in seen) == 5 + 10


def test_log_probabilities(tiny_model, bpe, photos):
    job = Job(photos[:2], "a", GREEDY, with_log_probs=True)
    with CaptionQueue(tiny_model, bpe) as queue:
        queue.add(job)
    for photo, [one] in zip(photos, job.answer.result(0), strict=False):
        assert len(one.log_probs) == len(one.ids) - one.prompt_length
        assert one.finished == (one.ids[-1] == bpe.eos_token_id)
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
        whole = log_probabilities(tiny_model, pixels, torch.tensor([one.ids]), one.prompt_length)
        assert sum(one.log_probs) == pytest.approx(whole.item(), abs=1e-4)
