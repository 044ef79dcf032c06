"""Tar shards: written bit for bit the same, read exactly once by any number of ranks and workers, resumed exactly;
what is broken in them is counted, and what is hostile does no harm."""

import io
import json
import random
import re
import signal
import sys
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_data
from captioning.common.stopping import Stopped
from captioning.data import photo_store, sources
from captioning.data.conventions import SPLITS
from captioning.data.shards import reading, streaming, writing
from captioning.images import tar_members
from captioning.images.preprocessing import load_image
from captioning.model.tokenizer import CaptionTokenizer
from conftest import CAPTIONS, make_flickr
from helpers.folders import for_everybody, read_only
from helpers.image_files import jpeg
from helpers.runs import TINY, assert_same_run, files, stop_after
from helpers.tar_files import COUNTS, make_shards, members, write_tar


@pytest.fixture(autouse=True)
def webdataset(request):
    """The library that reads and writes shards; who has it not installed skips what needs it."""
    if request.function not in (
        test_the_buffer_mixes_what_is_near, test_names_of_photos_become_keys,
        test_without_the_library_it_says_what_to_install,
    ):  # fmt: skip
        pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def words():
    """Has every word of the captions above; numbers, too."""
    text = " ".join(["shard photo caption long", *map(str, range(100))])
    return CaptionTokenizer.train([text, *CAPTIONS], 500, "word")


@pytest.fixture
def make_loader(script, tiny_train_config, words):
    """make_loader(folder, rank=0, ranks=1, **changes of the train_config)"""

    def make(folder, rank=0, ranks=1, **changes):
        config = script.complete(tiny_train_config, script.train_config)
        config.data_dir, config.batch_size, config.shuffle_buffer, config.length_window = folder, 4, 6, 1
        vars(config).update(changes)
        build, K = streaming.build_stream_loader, config.captions_per_image
        df = sources.load_usable(folder, None, None, "flickr30k")
        rows = script.Dataset(df[:0], script.build_transforms(16)[0], words, K, 24, config.seed, 100)
        collate = lambda batch: script.collate_fn(batch, words, K)  # noqa: E731
        loader = build(streaming.streamed_folder(df), rows, collate, config)
        loader.batch_sampler.set_rank(rank, ranks)
        return loader

    return make


def captions_in(batches, tokenizer):
    """Captions that are learnt from."""
    learnt = [(ids, labels) for _, *both in batches for ids, labels in zip(*both, strict=True)]
    return [tokenizer.decode(ids) for ids, labels in learnt if (labels != -100).any()]


def assert_same_batches(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert all(map(torch.equal, one, other))


# --- an epoch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("counts", [COUNTS, [[1, 2, 3, 1, 2, 3, 4]]], ids=["4 shards", "1 shard"])
def test_every_rank_reads_its_part_and_together_they_read_all(make_loader, words, tmp_path, ranks, K, counts):
    """With 0 and with 2 workers the same batches, as many on every rank; each caption once, with K > 1 each photo in
    n // K groups of different captions."""
    folder, learnt = make_shards(tmp_path / "shards", counts), []
    for rank in range(ranks):
        by_workers = []
        for workers in (0, 2) if rank == ranks - 1 else (0,):
            loader = make_loader(folder, rank, ranks, num_workers=workers, captions_per_image=K)
            by_workers.append(list(loader))
            assert len(by_workers[-1]) == len(loader)
        assert_same_batches(by_workers[0], by_workers[-1])
        learnt.append(captions_in(by_workers[0], words))
        groups = sum(max(1, count // K) for count in chain(*counts))
        assert len(loader) == -(-groups // (4 // K * ranks))
        assert len(learnt[-1]) in (groups // ranks * K, -(-groups // ranks) * K)
    found = Counter(chain(*learnt))
    for shard, photos in enumerate(counts):
        for photo, count in enumerate(photos):
            of_photo = [n for text, n in found.items() if text.startswith(f"shard {shard} photo {photo} ")]
            assert sum(of_photo) == max(1, count // K) * K
            assert max(of_photo) == (1 if count >= K else 2)
            if K == 1:
                assert len(of_photo) == count


def test_epochs_differ_and_a_seed_repeats(make_loader, words, tmp_path):
    folder, orders = make_shards(tmp_path / "shards"), []
    loader = make_loader(folder)
    for epoch, changes in ((0, {}), (0, {}), (1, {}), (0, dict(seed=1)), (0, dict(length_window=3))):
        loader = make_loader(folder, **changes)
        loader.dataset.set_epoch(epoch)
        loader.batch_sampler.set_epoch(epoch)
        orders.append(captions_in(loader, words))
    assert orders[0] == orders[1]
    assert all(orders[0] != other for other in orders[2:])


def test_the_buffer_mixes_what_is_near():
    order = list(streaming.buffered_order(1000, 50, random.Random(0)))
    assert sorted(order) == list(range(1000))
    assert all(number <= place + 50 for place, number in enumerate(order))  # it holds 50
    assert np.mean([abs(place - number) for place, number in enumerate(order)]) > 20
    assert list(streaming.buffered_order(5, 1, random.Random(0))) == list(range(5))


def test_captions_of_like_length_share_a_batch(make_loader, tmp_path):
    folder = make_shards(tmp_path / "shards")
    padding = []
    for window in (1, 20):
        loader = make_loader(folder, captions_per_image=1, length_window=window, shuffle_buffer=100)
        padding.append(sum(int((labels == -100).sum()) for _, _, labels in loader))
    assert padding[1] < 0.6 * padding[0]


def test_augmentation_changes_with_the_epoch_only(make_loader, tmp_path):
    folder, images = make_shards(tmp_path / "shards", [[1] * 4, [1]]), []
    for epoch in (0, 0, 1):
        loader = make_loader(folder, batch_size=8, captions_per_image=1)
        loader.dataset.set_epoch(epoch)  # the order stays: the sampler is not told
        images.append(next(iter(loader))[0])
    assert torch.equal(images[0], images[1])
    loader.batch_sampler.set_epoch(1)
    assert not torch.equal(images[0].sort(0)[0], next(iter(loader))[0].sort(0)[0])


# --- going on in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "window"), [(1, 1), (5, 1), (5, 3), (100, 2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_epoch_has_exactly_the_rest(make_loader, tmp_path, buffer, window, ranks):
    folder = make_shards(tmp_path / "shards")
    changes = dict(shuffle_buffer=buffer, length_window=window, captions_per_image=1, batch_size=3)
    whole = list(make_loader(folder, ranks - 1, ranks, **changes))
    loader = make_loader(folder, ranks - 1, ranks, **changes)
    for first in range(len(whole) + 1):
        loader.batch_sampler.skip_batches = first
        assert_same_batches(list(loader), whole[first:])
    assert_same_batches(list(loader), whole)  # `skip_batches` counts for one epoch
    with pytest.raises(ValueError, match="goes on with as many processes as it had: start 7"):
        loader.batch_sampler.set_rank(0, ranks, 7)


def test_shards_that_were_read_are_not_opened_again(make_loader, tmp_path, monkeypatch):
    folder, opened = make_shards(tmp_path / "shards", [[1] * 10] * 8), []
    read = streaming.read_samples
    monkeypatch.setattr(
        streaming, "read_samples", lambda path, *rest, **how: opened.append(path) or read(path, *rest, **how)
    )
    loader = make_loader(folder, captions_per_image=1, batch_size=4)
    opened.clear()
    list(loader)
    assert len(opened) == 8
    order = list(opened)
    opened.clear()
    loader.batch_sampler.skip_batches = 15  # 60 of 80 photos, behind which the buffer may still hold older ones
    list(loader)
    assert opened == order[-len(opened) :] and 2 <= len(opened) <= 4


def test_training_goes_on_bit_for_bit_with_another_number_of_workers(
    script, tiny_config, tiny_train_config, words, tmp_path
):
    def make(folder, **changes):
        config = script.complete(tiny_config, script.model_config)
        config.vocab_size, config.mlp_dropout = len(words), 0.2
        train = script.complete(tiny_train_config, script.train_config)
        train.model_path, train.epochs, train.score_images, train.shuffle_buffer = folder, 2, 2, 5
        vars(train).update(changes)
        df = sources.load_usable(data, None, None, "flickr30k")
        torch.manual_seed(0)
        return script.Trainer(config, train, script.build_dataloaders(df, words, config, train))

    data = make_shards(tmp_path / "shards")
    trainer = make(tmp_path / "whole")
    result = trainer.run_training()
    whole = result, files(tmp_path / "whole"), trainer.model.state_dict()
    folder = tmp_path / "stopped"
    for workers in (0, 2):
        trainer = make(folder, resume="auto", num_workers=workers)
        stop_after(trainer, len(trainer.train_dl) - 2, signal.SIGTERM)
        with pytest.raises(Stopped):
            trainer.run_training()
    trainer = make(folder, resume="auto")
    assert_same_run(trainer, trainer.run_training(), folder, whole)
    with pytest.raises(ValueError, match="shuffle_buffer: it was 5, now it is 6"):
        make(folder, resume="auto", shuffle_buffer=6)
    write_tar(data / "train-000000.tar", members(0, 0, 4))
    with pytest.raises(ValueError, match="training captions: they were 39"):
        make(folder, resume="auto")


# --- what is broken ---------------------------------------------------------------------------------------------------


def written(folder, photos=24, photos_per_shard=5):
    """Shards with a manifest; photos i = 1000... with 2 captions each."""
    data = make_flickr(folder / "photos", photos)
    results = (data / "results.csv").read_text().split("\n")
    lines = results[:1] + [
        f"{1000 + i}.jpg| {n}| shard 0 photo {i} caption {n}" for i in range(photos) for n in range(2)
    ]
    (data / "results.csv").write_text("\n".join(lines) + "\n")
    return folder / "shards", writing.write_shards(data, folder / "shards", photos_per_shard)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_truncated_shard_is_survived_and_counted(make_loader, words, tmp_path, capsys, ranks):
    """Number of batches and the other shards' captions stay."""
    folder, _ = written(tmp_path)
    before = [list(make_loader(folder, rank, ranks)) for rank in range(ranks)]
    cut(folder / "train-000001.tar", 0.5)
    loaders = [make_loader(folder, rank, ranks) for rank in range(ranks)]
    capsys.readouterr()
    after = [list(loader) for loader in loaders]
    said = capsys.readouterr().err
    assert "train-000001.tar: not a whole tar file (" in said and "Training goes on without it" in said
    assert [len(batches) for batches in after] == [len(batches) for batches in before]
    learnt = Counter(chain(*(captions_in(batches, words) for batches in after)))
    lost = Counter(chain(*(captions_in(batches, words) for batches in before))) - learnt
    assert set(learnt.values()) == {1}
    intact = [sample for i in (0, 2, 3) for sample in reading.read_samples(folder / f"train-{i:06d}.tar", pytest.fail)]
    assert 2 <= len(lost) <= 8 and len(lost) % 2 == 0
    assert not {text for sample in intact for text in sample.captions} & set(lost)
    lost_with = [loader.dataset.unreadable_photos.photos_lost_with for loader in loaders]
    assert sum(names.get(str(folder / "train-000001.tar"), 0) for names in lost_with) == len(lost) // 2
    list(loaders[0])
    assert "warning" not in capsys.readouterr().err  # it is named once


@pytest.mark.parametrize("what", ["photo", "json", "no photo", "links"])
def test_a_broken_member_is_skipped_and_counted(make_loader, words, tmp_path, capsys, what):
    folder = make_shards(tmp_path / "shards", [[2] * 4, [2] * 4])
    before = list(make_loader(folder))
    counts = json.loads((folder / "counts.json").read_text())
    content = {}
    for photo in range(4):
        content |= members(0, photo, 2)
    broken = {
        "photo": {"000001.jpg": b"no photo"},
        "json": {"000001.json": b"[" * 100_000},
        "no photo": {"000001.jpg": None},
        "links": {"000001.jpg": tarfile.TarInfo(), "000001.json": tarfile.TarInfo()},
    }[what]
    for value in broken.values():
        if isinstance(value, tarfile.TarInfo):
            value.type, value.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content = {name: value for name, value in (content | broken).items() if value is not None}
    write_tar(folder / "train-000000.tar", content)
    (folder / "manifest.json").write_text(json.dumps(counts))  # it is known how the shards were
    loader = make_loader(folder, num_workers=2)
    capsys.readouterr()
    for _ in range(2):
        learnt = captions_in(loader, words)
        assert len(learnt) == len(set(learnt)) == 14
        assert not any("shard 0 photo 1 " in text for text in learnt)
    assert len(loader) == len(before)
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: ") == (what != "photo")  # else a worker says it, which has its own
    assert loader.dataset.unreadable_photos.count() == 1


def test_too_much_that_is_broken_ends_the_run(make_loader, tmp_path):
    folder, _ = written(tmp_path)
    for name in ("train-000000.tar", "train-000002.tar"):
        cut(folder / name, 0.3)
    list(make_loader(folder, max_bad_images=2))
    with pytest.raises(ValueError, match=r"2 photos and shards cannot be read, .*max_bad_images is 1"):
        list(make_loader(folder, max_bad_images=1))
    for path in folder.glob("train-*.tar"):
        path.write_text("no tar")
    with pytest.raises(ValueError, match="20 of 20 photos are lost"):
        list(make_loader(folder))


def test_vanished_shards(make_loader, tmp_path):
    folder, _ = written(tmp_path)
    loader = make_loader(folder)
    (folder / "train-000002.tar").rename(tmp_path / "elsewhere")
    list(loader)
    assert loader.dataset.unreadable_photos.photos_lost_with == {str(folder / "train-000002.tar"): 5}
    with pytest.raises(FileNotFoundError, match=r"train-000002.tar: not there, though manifest.json names it"):
        make_loader(folder)
    (tmp_path / "elsewhere").rename(folder / "train-000002.tar")
    loader = make_loader(folder)
    folder.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="the shards have vanished"):
        list(loader)


# --- shards from elsewhere --------------------------------------------------------------------------------------------


def img2dataset(folder, photos=(4, 3, 2)):
    """As img2dataset 1.45 writes them: jpg, json and txt of one caption, tables and statistics beside them."""
    folder.mkdir()
    for shard, count in enumerate(photos):
        content = {}
        for i in range(count):
            key, text = f"{shard:05d}{i:04d}", f"Shard {shard}  photo {i} caption 0"
            record = dict(caption=text, url="https://x/y.jpg", key=key, status="success", error_message=None, width=24)
            content |= {f"{key}.jpg": jpeg(i), f"{key}.json": json.dumps(record).encode(), f"{key}.txt": text.encode()}
        write_tar(folder / f"{shard:05d}.tar", content)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(dict(count=count + 1, successes=count)))
    return folder


def test_what_img2dataset_writes_is_read(make_loader, words, tmp_path, monkeypatch, capsys):
    """The last shard is for validation; the others are counted once."""
    folder = img2dataset(tmp_path / "laion")
    df = sources.load(folder)
    assert df["split"].tolist() == ["train"] * 7 + ["val"] * 2
    loader = make_loader(folder, captions_per_image=1, batch_size=2)
    assert len(loader) == 4 and len(loader.dataset) == 7
    expected = [f"shard {shard} photo {i} caption 0" for shard, count in ((0, 4), (1, 3)) for i in range(count)]
    assert sorted(captions_in(loader, words)) == expected
    assert "train: 7 photos in 2 shards, read as a stream" in capsys.readouterr().out
    counted = []
    count = reading.count_shard
    monkeypatch.setattr(reading, "count_shard", lambda path: counted.append(path.name) or count(path))
    make_loader(folder)
    assert counted == []
    write_tar(folder / "00001.tar", {"a.jpg": jpeg(), "a.txt": b"one\ntwo", "b.jpg": jpeg(), "b.txt": b""})
    assert len(make_loader(folder).dataset) == 6
    assert counted == ["00001.tar"]
    assert "left out 1 photos without a usable caption" in capsys.readouterr().out


def test_a_folder_that_may_only_be_read(make_loader, capsys):
    with for_everybody() as place:
        folder = img2dataset(place / "laion")
        with read_only(folder):
            assert len(make_loader(folder).dataset) == 7
            assert "The shards are counted again at the next start" in capsys.readouterr().out
        assert not (folder / "counts.json").exists()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000000.tar", "train-000001.tar"], {"train": 1, "val": 1}),
        (["cc3m-train-0000.tar", "cc3m-validation-0000.tar", "readme.tar"], {"train": 1, "val": 1}),
        (["000.tar", "001.tar", "002.tar"], {"train": 2, "val": 1}),
        (["train-0.tar", "val_0.tar", "test.0.tar"], {"train": 1, "val": 1, "test": 1}),
    ],
)
def test_names_tell_splits(tmp_path, names, splits):
    for name in names:
        (tmp_path / name).touch()
    assert {split: len(paths) for split, paths in reading.shards_by_split(tmp_path).items()} == splits


def test_one_shard_alone_leaves_nothing_for_validation(tmp_path):
    write_tar(tmp_path / "00000.tar", members(0, 0, 1))
    with pytest.raises(ValueError, match="nothing is left for validation"):
        sources.load_usable(tmp_path, None, None, "flickr30k")


@pytest.mark.parametrize(
    ("content", "captions", "prompts"),
    [
        ({"txt": b"A  Dog\nTwo dogs\n\n"}, ["a dog", "two dogs"], ["", ""]),
        ({"json": b'{"captions": ["One", "", "Two"]}'}, ["one", "two"], ["", ""]),
        ({"json": b'{"caption": null}', "txt": b"from the text"}, ["from the text"], [""]),
        ({"json": b'{"text": "\\ud800"}'}, [], []),
        ({"json": b'{"question": "Is it?", "answers": ["Yes", "No"]}'}, ["yes", "no"], ["is it?"] * 2),
        ({"json": b'{"captions": ["a", "b"], "prompts": ["x", "y"]}'}, ["a", "b"], ["x", "y"]),
        ({"txt": b"\xff\xfe bytes"}, [], []),
        ({"txt": b"x" * 20_000}, [], []),
    ],
)
def test_captions_beside_a_photo(tmp_path, content, captions, prompts):
    path = write_tar(tmp_path / "0.tar", {"a/b.JPG": jpeg(), **{f"a/b.{kind}": text for kind, text in content.items()}})
    (sample,) = reading.read_samples(path, pytest.fail, with_photos=True)
    assert sample == ("a/b.JPG", jpeg() if captions else None, captions, prompts)


# --- which members are a sample ---------------------------------------------------------------------------------------


def names_and_problems(tmp_path, names):
    """Names of members, captions being their name -> [(photo, captions)], [problem] as `read_samples` sees them."""
    problems, path = [], tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = jpeg() if name.endswith(("jpg", "JPG", "png")) else f'["{name}"]'.encode()
            content = content if name.endswith(("jpg", "JPG", "png", "txt")) else b'{"captions": %s}' % content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    samples = reading.read_samples(path, lambda name, reason: problems.append(f"{Path(name).name}: {reason}"))
    return [(sample.name, sample.captions) for sample in samples], problems


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        # several photos with one name up to the first dot, each with captions of its own
        (["p.v1.7.JPG", "p.v1.7.json", "p.v1.8.JPG", "p.v1.8.json"], {"p.v1.7.JPG": "p.v1.7", "p.v1.8.JPG": "p.v1.8"}),
        (["p.v1.JPG", "p.v2.JPG", "p.v1.json", "p.v2.json"], {"p.v1.JPG": "p.v1", "p.v2.JPG": "p.v2"}),
        # the layout's own: one photo, whatever else the sample has
        (["p.v1.jpg", "p.json"], {"p.v1.jpg": "p"}),
        (["p.mask.png", "p.jpg", "p.json", "p.meta.json"], {"p.jpg": "p"}),
        (["p.meta.json", "p.jpg", "p.json"], {"p.jpg": "p"}),
        (["a/1.jpg", "a/1.json", "b/1.jpg", "b/1.json"], {"a/1.jpg": "a/1", "b/1.jpg": "b/1"}),
        # a photo without captions beside others that have theirs
        (["p.v1.jpg", "p.v1.json", "p.v2.jpg"], {"p.v1.jpg": "p.v1", "p.v2.jpg": None}),
    ],
)  # fmt: skip
def test_names_tell_samples_apart(tmp_path, names, samples):
    expected = [(name, [f"{text}.json"] if text else []) for name, text in samples.items()]
    assert names_and_problems(tmp_path, names) == (expected, [])


@pytest.mark.parametrize(
    ("names", "kept", "problem"),
    [
        (["a.jpg", "b.jpg", "a.json", "b.json"], 2, "0.tar: 2 samples are torn apart: their photos and captions do not "
         "lie side by side; the first: a. Write the tar again with its members sorted by name (tar --sort=name)"),
        (["a.jpg", "a.json", "b.jpg", "b.json", "a.jpg", "a.json"], 2, "0.tar: 2 members have the name of another one, "
         "and only the first of a name is read; the first: a.jpg. Write the tar again with a name of its own for each "
         "photo"),
        (["a.jpg", "a.json", "a.jpg", "a.json"], 1, "0.tar: 2 members have the name of another one, and only the first "
         "of a name is read; the first: a.jpg. Write the tar again with a name of its own for each photo"),
        (["a.left.jpg", "a.right.jpg", "a.json"], 0, "a: has 2 photos, and nothing says whose its captions are: name "
         "them like their photo, a.left.json"),
        (["a.jpg", "a.json", ".b.jpg"], 1, ".b.jpg: its name begins with a dot, which says that it is hidden"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_told_apart_are_named(tmp_path, names, kept, problem):
    samples, problems = names_and_problems(tmp_path, names)
    assert len(samples) == kept and problems == [problem]
    assert all(captions in ([], [f"{Path(name).stem}.json"]) for name, captions in samples)


def test_photos_that_training_does_not_see_are_told_at_every_start_and_by_the_check(make_loader, tmp_path, capsys):
    """A shard whose photos come first and their captions behind them."""
    folder = make_shards(tmp_path / "shards", [[1] * 3, [1] * 3])
    content = members(0, 0, 1) | members(0, 1, 1) | members(0, 2, 1)
    torn = dict(sorted(content.items(), key=lambda item: item[0].endswith("json")))
    write_tar(folder / "train-000000.tar", torn)
    for _ in range(2):
        assert len(make_loader(folder).dataset) == 3
        said = capsys.readouterr().out
        assert said.count("train-000000.tar: 3 samples are torn apart") == 1 and "left out 3 photos without" in said
    with pytest.raises(SystemExit):
        prepare_data.main(["--check", str(folder), "--report", str(tmp_path / "report")])
    said = capsys.readouterr().out
    assert "error: damaged shards, and samples in them: 1" in said
    assert "shards with photos that have no usable caption beside them: 1" in said
    assert "- train-000000.tar (3 photos)" in said
    write_tar(folder / "val-000000.tar", torn)
    capsys.readouterr()
    with pytest.raises(ValueError, match="no photo of its val shards has a usable caption beside it"):
        sources.load(folder, shard_splits=["val"])
    assert capsys.readouterr().out.count("warning") == 1


# --- hostile tars -----------------------------------------------------------------------------------------------------


def test_hostile_names_and_links_do_nothing(tmp_path):
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo()
    device.type = tarfile.CHRTYPE
    (tmp_path / "secret.jpg").write_bytes(jpeg(7))
    (tmp_path / "tars").mkdir()
    content = {"../secret.jpg": jpeg(1), "../secret.txt": b"a", "/etc/x.jpg": jpeg(2), "/etc/x.txt": b"b"}
    content |= {
        "l.jpg": link,
        "l.txt": b"c",
        "d.jpg": device,
        "d.txt": b"d",
        "__meta__.json": b"{",
        "fine.jpg": jpeg(3),
    }
    content |= {"fine.txt": b"fine", "fine.webp": b"of two, the first", "huge.jpg": jpeg(), "huge.txt": b" " * 2**21}
    path = write_tar(tmp_path / "tars" / "0.tar", content)
    before = sorted(tmp_path.rglob("*"))
    problems = []
    (sample,) = reading.read_samples(path, lambda *problem: problems.append(problem), with_photos=True)
    assert sample.name == "fine.jpg" and sample.photo == jpeg(3)
    assert [(Path(name).name, reason) for name, reason in problems] == [
        ("huge", "its .txt has 2,097,152 bytes"),
        ("l", "has no photo"),
        ("d", "has no photo"),
    ]
    with pytest.raises(ValueError, match=r"fine.txt: not a readable image \(cannot identify image file '.*fine.txt'\)"):
        load_image(path / "fine.txt")
    for name in ("../secret.jpg", "../../secret.jpg", "l.jpg", "/etc/x.jpg"):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_image(f"{path}/{name}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_header_that_lies_about_the_size(tmp_path, monkeypatch):
    huge = tarfile.TarInfo()
    huge.size = 2**40
    with open(write_tar(tmp_path / "0.tar", {"a.jpg": huge}), "rb") as file:
        content = file.read(512)
    (tmp_path / "0.tar").write_bytes(content + b"x" * 2000)
    problems = []
    with pytest.raises(ValueError, match="not a whole tar"):
        list(reading.read_samples(tmp_path / "0.tar", lambda *problem: problems.append(problem), with_photos=True))
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "0.tar" / "a.jpg")


def test_damaged_bytes_are_an_error_or_a_loss_never_more(tmp_path):
    rng, whole = np.random.default_rng(0), (make_shards(tmp_path / "s") / "train-000002.tar").read_bytes()
    read, failed = Counter(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole) // 512, 3):
            start = int(place) * 512 + int(rng.integers(0, 100))
            damaged[start : start + 8] = rng.bytes(8)
        path = tmp_path / "damaged.tar"
        path.write_bytes(damaged[: int(rng.integers(1, len(whole) + 1))])
        try:
            for sample in reading.read_samples(path, lambda name, reason: None, with_photos=True):
                read[sample.name] += 1
        except ValueError:
            failed += 1
    assert failed > 100 and sum(read.values()) > 100


# --- writing ----------------------------------------------------------------------------------------------------------


def content_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture
def in_one_go(tmp_path):
    data = make_flickr(tmp_path / "data", 24)
    (data / "flickr30k_images" / "1004.jpg").write_text("no photo")
    writing.write_shards(data, tmp_path / "whole", 4)
    return data, tmp_path / "whole", content_of(tmp_path / "whole")


def test_the_manifest_tells_what_is_there(in_one_go):
    _, folder, content = in_one_go
    manifest = json.loads(content["manifest.json"])
    assert set(content) == {"manifest.json", *manifest["shards"]}
    assert list(manifest["shards"]) == [f"train-{i:06d}.tar" for i in range(5)] + ["val-000000.tar", "test-000000.tar"]
    assert manifest["photos"] == 23 and "1004.jpg: not a readable image" in manifest["left_out"][0]
    assert str(folder.parent) not in content["manifest.json"].decode()
    assert manifest["splits"]["train"] == dict(
        shards=5, photos=19, captions=38, bytes=sum(len(content[f"train-{i:06d}.tar"]) for i in range(5))
    )
    for name, entry in manifest["shards"].items():
        counted, problems = reading.count_shard(folder / name)
        assert not problems
        assert [counted[key] for key in ("samples", "captions", "bytes")] == [
            entry[key] for key in ("samples", "captions", "bytes")
        ]


def test_processes_and_interruptions_leave_the_same_bytes(in_one_go, tmp_path, monkeypatch, capsys):
    data, _, content = in_one_go
    writing.write_shards(data, tmp_path / "parallel", 4, num_workers=2)
    assert content_of(tmp_path / "parallel") == content

    write, count = writing.write_shard, Counter()

    def stopped(path, samples):
        count[path.name] += 1
        if sum(count.values()) % 3 == 0:  # killed while it writes: the draft stays
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(path, samples)

    monkeypatch.setattr(writing, "write_shard", stopped)
    folder = tmp_path / "stopped"
    for _ in range(3):
        with pytest.raises(SystemExit, match="running the same command again goes on"):
            prepare_data.main(
                ["--shards", str(data), "--to", str(folder), "--photos_per_shard", "4", "--num_workers", "0"]
            )
        with pytest.raises(ValueError, match="not all written yet"):
            sources.load(folder)
    monkeypatch.setattr(writing, "write_shard", write)
    writing.write_shards(data, folder, 4)
    assert content_of(folder) == content
    assert set(count.values()) == {1, 2}  # what was whole was not written again

    capsys.readouterr()
    writing.write_shards(data, folder, 4)
    assert "7 shards, 0 of them written now" in capsys.readouterr().out
    (folder / "train-000003.tar").unlink()
    writing.write_shards(data, folder, 4)
    assert content_of(folder) == content


def test_shards_of_something_else_stay(in_one_go, tmp_path):
    data, folder, content = in_one_go
    with pytest.raises(ValueError, match="another number of photos each: give another folder with --to"):
        writing.write_shards(data, folder, 5)
    (data / "results.csv").write_text((data / "results.csv").read_text().replace("red", "blue"))
    with pytest.raises(ValueError, match="of another dataset"):
        writing.write_shards(data, folder, 4)
    assert content_of(folder) == content
    with pytest.raises(FileExistsError, match="something other than shards"):
        writing.write_shards(data, data, 4)
    for photo in (data / "flickr30k_images").iterdir():
        photo.write_text("no photo")
    with pytest.raises(ValueError, match="none of its photos can be read"):
        writing.write_shards(data, tmp_path / "none", 4)


def test_a_full_disk_leaves_what_is_whole(in_one_go, tmp_path, monkeypatch):
    data, _, content = in_one_go
    write = writing.write_shard

    def full(path, samples):
        if path.name == "train-000002.tar":
            raise OSError(28, "No space left on device", str(path))
        return write(path, samples)

    monkeypatch.setattr(writing, "write_shard", full)
    with pytest.raises(OSError, match=r"No space left on device.*train-000002.tar"):
        writing.write_shards(data, tmp_path / "full", 4)
    monkeypatch.setattr(writing, "write_shard", write)
    writing.write_shards(data, tmp_path / "full", 4)
    assert content_of(tmp_path / "full") == content


def test_names_of_photos_become_keys():
    images = [Path(f"/d/{name}") for name in ("a/1.jpg", "b/1.jpg", "x.y.jpg", "__z__.png", "000000000139.jpg")]
    keys = list(writing._keys(images).values())
    assert keys == ["1_000000000", "1_000000001", "x_y", "photo___z__", "000000000139"]


def test_shards_hold_what_the_dataset_held(flickr, tmp_path):
    """Rows and pixels; from shards a photo store and other shards can be made; the library reads them, too."""
    lines = [
        dict(image=f"{1000 + i}.jpg", question=f"what is {i} ?", answer=f"it is {n}", split=SPLITS[i % 3])
        for i in range(12)
        for n in range(2)
    ]
    (flickr / "results.csv").unlink()
    (flickr / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def rows(folder):
        df = sources.drop_unusable(sources.load(folder), folder)
        return sorted(zip((path.stem for path in df["image"]), df["caption"], df["split"], df["prompt"], strict=True))

    def pixels(folder):
        return {path.stem: np.asarray(load_image(path)).tobytes() for path in sources.load(folder)["image"]}

    writing.write_shards(flickr, tmp_path / "shards", 3)
    writing.write_shards(tmp_path / "shards", tmp_path / "again", 2)
    photo_store.write_store(tmp_path / "shards", tmp_path / "store", 64)
    for folder in ("shards", "again", "store"):
        assert rows(tmp_path / folder) == rows(flickr)
        assert pixels(tmp_path / folder) == pixels(flickr)
    import webdataset

    path = str(tmp_path / "shards" / "val-000000.tar")
    found = list(webdataset.WebDataset(path, shardshuffle=False))
    assert len(found) == 3 and all(len(jpeg["jpg"]) > 500 for jpeg in found)
    assert json.loads(found[0]["json"])["prompts"] == ["what is 1 ?"] * 2


def test_the_check_compares_hashes(in_one_go, tmp_path, capsys):
    _, folder, _ = in_one_go
    check = ["--check", str(folder), "--report", str(tmp_path / "report")]
    prepare_data.main(check)
    assert "none" in capsys.readouterr().out
    content = bytearray((folder / "train-000001.tar").read_bytes())
    content[600] ^= 1  # in a photo
    (folder / "train-000001.tar").write_bytes(content)
    cut(folder / "train-000002.tar", 0.5)
    (folder / "test-000000.tar").unlink()
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(check)
    assert stop.value.code == 1
    report = (tmp_path / "report" / "report.md").read_text()
    assert "train-000001.tar: another hash than in manifest.json" in report
    assert re.search(r"train-000002.tar: [\d,]+ bytes instead of [\d,]+", report)
    assert "train-000002.tar: not a whole tar file" in report and "test-000000.tar: not there" in report


# --- with the script --------------------------------------------------------------------------------------------------


def test_the_script_trains_on_shards_of_shapes(script, tmp_path, capsys):
    from captioning.data import shapes

    shapes.write_dataset(tmp_path / "shapes", train_scenes=24)
    prepare_data.main(["--shards", str(tmp_path / "shapes"), "--photos_per_shard", "5", "--num_workers", "0"])
    folder, output = tmp_path / "shapes_shards", tmp_path / "captioner"
    result = script.main(["--data_dir", str(folder), "--model_path", str(output), "--shuffle_buffer", "10", *TINY])
    said = capsys.readouterr().out
    assert "train: 24 photos in 5 shards, read as a stream" in said
    assert "generated: " in said and (output / "demo.png").is_file()
    assert np.isfinite(result["best_perplexity"])
    assert "shape" not in json.loads((output / "tokenizer.json").read_text())["model"]  # a whole BPE is in there
    model, tokenizer = script.load_captioner(output)
    df = sources.load(folder)
    image = df["image"][df["split"] == "test"].iloc[0]
    assert tar_members.tar_of(image) == folder / "test-000000.tar"
    (caption,) = script.caption_images(model, tokenizer, [image])
    assert isinstance(caption, str)


@pytest.mark.parametrize("changes", [dict(cache_tokens=True), dict(scst_epochs=1)])
def test_what_needs_random_access_is_refused(make_loader, tmp_path, changes):
    folder = make_shards(tmp_path / "shards", [[1]])
    with pytest.raises(ValueError, match=f"{next(iter(changes))} needs photos in any order.*leave it out"):
        make_loader(folder, **changes)


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    folder = make_shards(tmp_path / "shards", [[1]])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-extra.txt"):
        sources.load_usable(folder, None, None, "flickr30k")


def test_a_full_frame_of_shards_is_read_by_random_access(script, tmp_path, words):
    folder = make_shards(tmp_path / "shards")
    df = sources.load(folder)
    assert streaming.streamed_folder(df) is None and len(df) == 43
    dataset = script.Dataset(df, script.build_transforms(16)[1], words)
    image, ids, _ = dataset[5]
    assert image.shape == (3, 16, 16) and words.decode(ids) == "shard 0 photo 1 caption 0"
    expected = script.build_transforms(16)[1](image=np.asarray(Image.open(io.BytesIO(jpeg(1)))))["image"]
    assert torch.equal(image, expected)
