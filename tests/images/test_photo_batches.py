"""Photos decoded by threads: the pixels of validation, in order, never more than one batch ahead."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.images import photo_batches as module
from captioning.images.photo_batches import photo_batches
from captioning.images.preprocessing import normalize, preprocess

ACCELERATOR = "mps"  # nothing is computed on it here


@pytest.fixture
def files(tmp_path):
    """Seven photos of noise in several formats and sizes."""
    rng, paths = np.random.default_rng(0), []
    for i in range(7):
        paths.append(tmp_path / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def started(monkeypatch):
    """Names of the files whose decoding began; `release` lets it go on, where it was cleared before."""
    names, resize = [], module.resize

    def counted(source, *args):
        names.append(source.name)
        counted.release.wait(60)
        return resize(source, *args)

    counted.names, counted.release = names, threading.Event()
    counted.release.set()
    monkeypatch.setattr(module, "resize", counted)
    return counted


def in_pairs(items):
    return [items[i : i + 2] for i in range(0, len(items), 2)]


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_pixels_are_those_of_validation(files, device):
    """Whatever an image is given as; one that the caller holds may be there twice."""
    opened = Image.open(files[0])
    sources = [*files[:3], str(files[3]), opened, opened, np.asarray(Image.open(files[5]))]
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    batches = list(photo_batches(in_pairs(sources), 32, "bicubic", device))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    expected = torch.stack([preprocess(source, 32, mean, std) for source in sources])
    assert torch.equal(normalize(torch.cat(batches), mean, std), expected)


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_an_unreadable_photo_is_an_error_when_its_batch_is_due(files, device):
    files[3].write_bytes(b"no picture")
    files[2].unlink()
    batches = photo_batches(in_pairs(files), 32, "bicubic", device)
    assert next(batches).shape == (2, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=f"{files[2].name}: no such image"):  # the first of the two
        next(batches)


def test_one_batch_ahead_of_an_accelerator(files, started):
    names = [path.name for path in files]
    batches = photo_batches(in_pairs(files), 32, "bicubic", ACCELERATOR)
    assert not started.names
    for got in range(1, 5):
        next(batches)
        assert set(names[: 2 * got]) <= set(started.names) <= set(names[: 2 * got + 2])
    assert not list(batches)
    assert sorted(started.names) == names


def test_a_cpu_has_no_batch_decoded_ahead(files, started):
    batches = photo_batches(in_pairs(files), 32, "bicubic", "cpu")
    for got in range(1, 5):
        next(batches)
        assert len(started.names) == min(2 * got, 7)


def test_threads_decode_together(files, started, monkeypatch):
    """Both photos of a batch are begun before either is done, and what nobody waits for any more is not begun."""
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    before = threading.active_count()
    started.release.clear()
    batches, first = photo_batches([files[:2], files[2:]], 32, "bicubic", ACCELERATOR), []
    reader = threading.Thread(target=lambda: first.append(next(batches)))
    reader.start()
    while len(started.names) < 2:
        assert reader.is_alive()
    started.release.set()
    reader.join()
    assert first[0].shape == (2, 3, 32, 32)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_for_a_gpu_are_pinned(files):
    assert all(batch.is_pinned() for batch in photo_batches(in_pairs(files), 32, "bicubic", "cuda"))
