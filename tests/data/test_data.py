"""Annotation files, splits and batches."""

import gc
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from captioning.data import sources, workers
from captioning.data.batching import CaptionBatchSampler
from captioning.data.splits import assign_splits
from captioning.images.preprocessing import load_image, normalize_pixels
from captioning.model.tokenizer import encode_caption
from captioning.training.cross_entropy import CrossEntropy
from conftest import CAPTIONS

# --- readers ----------------------------------------------------------------------------------------------------------


def read(tmp_path, text, name="results.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return sources.read_captions(tmp_path / name)


def test_results_csv(tmp_path):
    df = read(
        tmp_path, 'image_name| comment_number| comment\n1.jpg| 0| Two "young" Guys .\n1.jpg| 1|  NULL \n2.jpg| 0|\n'
    )
    assert df["image"].tolist() == ["1.jpg", "1.jpg", "2.jpg"]
    assert df["caption"].tolist() == ['two "young" guys .', "null", ""]


def test_row_without_last_delimiter_is_repaired(tmp_path):
    df = read(
        tmp_path,
        "image_name| comment_number| comment\n2199200615.jpg| 3| A dog .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n",
    )
    assert df["caption"].tolist() == ["a dog .", "a dog runs across the grass ."]


def test_captions_txt(tmp_path):
    df = read(tmp_path, 'image,caption\n1.jpg,"A man , a dog ."\n1.jpg,A ""fast"" car\n', "captions.txt")
    assert df["caption"].tolist() == ["a man , a dog .", 'a ""fast"" car']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a|b\n1|2\n", r"results\.csv: no column caption and image; it has a, b"),
        ("image_name| comment_number| comment\n", "holds no captions"),
        ("", "results.csv"),
        ("image_name| comment_number| comment\n1.jpg| 0| a\n| 1| b\n", "line 3: no image name"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_load_flickr_dataframe(script, flickr):
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    assert list(df.columns) == ["image", "caption", "split"]
    assert len(df) == 24
    assert df["image"].map(lambda path: path.is_file()).all()
    assert df.groupby("split")["image"].nunique().to_dict() == {"train": 8, "val": 2, "test": 2}


def test_missing_annotations(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no captions there: looked for results\.csv, captions\.txt"):
        script._load_flickr_dataframe(tmp_path, tmp_path)


def test_unusable_rows_are_counted_and_named(script, flickr, capsys):
    (flickr / "flickr30k_images" / "1003.jpg").unlink()
    with open(flickr / "results.csv", "a") as file:
        file.write("1000.jpg| 2|\n")
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    assert len(sources.drop_unusable(df, "results.csv")) == 22
    said = capsys.readouterr().out
    assert "left out 1 of 25 rows; the first, line 26, has no caption" in said
    assert "left out 2 of 25 rows; the first, line 8, names a photo that is not there" in said
    with pytest.raises(FileNotFoundError, match=r"none of the photos named in results\.csv"):
        sources.drop_unusable(df.assign(image=df["image"].map(lambda path: path / "gone")), "results.csv")
    images = flickr / "flickr30k_images"
    said = f"tried {images / '1000.jpeg'} and {images / '1001.jpeg'}; the folder holds 1000.jpg, 1001.jpg, 1002.jpg, 8"
    with pytest.raises(FileNotFoundError, match=re.escape(said)):
        sources.drop_unusable(df.assign(image=df["image"].map(lambda path: path.with_suffix(".jpeg"))), "results.csv")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_seeded_split_is_by_image(tmp_path):
    images = pd.Series([f"{i}.jpg" for i in range(100) for _ in range(5)])
    splits = assign_splits(images, tmp_path, seed=3)
    per_image = pd.DataFrame({"image": images, "split": splits}).groupby("image")["split"].unique()
    assert (per_image.map(len) == 1).all()
    assert per_image.map(lambda values: values[0]).value_counts().to_dict() == {"train": 90, "val": 5, "test": 5}
    assert splits.equals(assign_splits(images, tmp_path, seed=3))
    assert not splits.equals(assign_splits(images, tmp_path, seed=4))


def test_karpathy_split(tmp_path):
    records = [("1.jpg", "restval"), ("2.jpg", "val"), ("3.jpg", "test")]
    file = {"images": [{"filename": name, "split": split} for name, split in records]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(file))
    images = pd.Series(["3.jpg", "1.jpg", "2.jpg", "unlisted.jpg"])
    assert assign_splits(images, tmp_path).tolist() == ["test", "train", "val", "test"]


def test_split_lists(tmp_path):
    (tmp_path / "train.txt").write_text("1.jpg\n2.jpg\n")
    (tmp_path / "val.txt").write_text("3.jpg\n")
    assert assign_splits(pd.Series(["1.jpg", "3.jpg", "9.jpg"]), tmp_path).tolist() == ["train", "val", "test"]
    (tmp_path / "val.txt").write_text("3.jpg\n1.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt: 1\.jpg is also in the train list"):
        assign_splits(pd.Series(["1.jpg"]), tmp_path)


def test_too_few_images_to_split_are_all_test(tmp_path):
    assert set(assign_splits(pd.Series(["1.jpg", "2.jpg", "2.jpg"]), tmp_path)) == {"test"}


# --- batches ----------------------------------------------------------------------------------------------------------


def test_sampler_puts_captions_of_an_image_side_by_side():
    images = ["a"] * 5 + ["b"] * 5 + ["c"]
    sampler = CaptionBatchSampler(images, batch_size=4, captions_per_image=2, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3
    rows = [row for batch in batches for row in batch]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert all(images[x] == images[y] for x, y in pairs)
    assert sorted(images[x] for x, _ in pairs) == ["a", "a", "b", "b", "c"]
    assert (10, 10) in pairs  # a single caption repeats
    used = [row for row in rows if row != 10]
    assert len(set(used)) == 8  # nothing else does


def test_sampler_with_one_caption_visits_every_row_once():
    sampler = CaptionBatchSampler(list("aabbbc"), batch_size=4)
    first = [row for batch in sampler for row in batch]
    assert sorted(first) == list(range(6))
    assert first == [row for batch in sampler for row in batch]
    sampler.set_epoch(1)
    assert first != [row for batch in sampler for row in batch]


@pytest.mark.parametrize("shuffle", [True, False])
def test_captions_of_like_length_share_a_batch(shuffle):
    """The same groups as without sorting, each once, with far less padding; the order is still random."""
    rng = np.random.default_rng(0)
    images, lengths = np.repeat(np.arange(300), 2).tolist(), rng.integers(5, 30, 600).tolist()

    def batches(**options):
        return list(CaptionBatchSampler(images, 20, 2, shuffle, seed=3, **options))

    def padding(batches):
        return sum(max(lengths[row] for row in rows) - lengths[row] for rows in batches for row in rows)

    plain, sorted_ = batches(), batches(lengths=lengths, window=10)
    assert sorted(row for rows in sorted_ for row in rows) == list(range(600))
    assert len(sorted_) == len(plain) == 30
    assert all(images[a] == images[b] for rows in sorted_ for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert padding(sorted_) < 0.75 * padding(plain)
    assert sorted_ == batches(lengths=lengths, window=10)
    assert batches(lengths=lengths, window=1) == plain
    longest = [max(lengths[row] for row in rows) for rows in sorted_]
    assert (longest[:10] == sorted(longest[:10])) == (not shuffle)  # short batches do not always come first


def test_batch_size_must_be_a_multiple():
    with pytest.raises(ValueError, match=r"batch_size 32 .* multiple of captions_per_image 5, for example 30"):
        CaptionBatchSampler(["a"], batch_size=32, captions_per_image=5)


def test_sampler_that_leaves_nothing_out():
    """Every row, side by side with others of its image; a group that is not full repeats its own."""
    images = [image for image in range(1, 8) for _ in range(image)]  # the 1-7 captions of seven images
    sampler = CaptionBatchSampler(images, 6, 3, shuffle=False, leave_out=False)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 6  # of two groups
    rows = [row for batch in batches for row in batch]
    assert set(rows) == set(range(28))
    groups = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    assert all(len({images[row] for row in group}) == 1 for group in groups)
    assert sum(len(set(group)) for group in groups) == 28  # no row is in two groups


@pytest.fixture
def one_to_seven(script, flickr, tiny_train_config):
    """A DataFrame of validation photos with one to seven captions of different lengths; one other photo trains."""
    rng, words, rows = np.random.default_rng(0), " ".join(CAPTIONS).split(), []
    photos = sorted((flickr / "flickr30k_images").iterdir())
    for count, photo in enumerate(photos[:8]):
        for _ in range(count or 5):
            text = " ".join(rng.choice(words, rng.integers(2, 15)))
            rows.append(dict(image=photo, caption=text, split="val" if count else "train"))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_shares_encodings_and_counts_each_caption_once(
    script, tiny_model, tiny_config, tiny_train_config, one_to_seven, bpe, ranks
):
    config = script.complete(tiny_config, script.model_config)

    def validate(K):
        """-> (perplexity, labels, photos encoded)"""
        train_config = script.complete(tiny_train_config, script.train_config)
        train_config.captions_per_image, train_config.batch_size, train_config.length_window = K, 3 * K, 2
        total, labels, encoded = 0.0, 0, 0
        for rank in range(ranks):
            loader = script.build_dataloaders(one_to_seven, bpe, config, train_config)[1]
            loader.batch_sampler.set_rank(rank, ranks)
            objective = CrossEntropy(tiny_model, loader)
            for batch in loader:
                count = objective.count(batch)
                assert count
                total += objective.loss(objective.to_device(batch, torch.device("cpu")))[1].item() * count
                labels, encoded = labels + count, encoded + len(batch[0])
        return math.exp(total / labels), labels, encoded

    with torch.inference_mode():
        one_by_one, expected_labels, encoded = validate(1)
        assert encoded == 28
        for K, fewest in ((2, 16), (3, 12), (5, 9), (7, 7), (8, 7)):
            perplexity, labels, encoded = validate(K)
            assert (labels, encoded) == (expected_labels, fewest)
            assert perplexity == pytest.approx(one_by_one, rel=1e-5)


def test_a_caption_that_repeats_in_training_counts_again(script, dls, bpe):
    """As the groups of a batch sampler are made: an image with fewer captions weighs as much as the others."""
    training, validation = (loader.dataset for loader in dls)
    for dataset, repeats in ((training, True), (validation, False)):
        *_, labels = script.collate_fn(dataset.__getitems__([0, 0]), bpe, 2)
        assert torch.equal(labels[0], labels[1]) == repeats
        assert (labels[1] == script.IGNORED_LABEL).all() != repeats


def test_dataset_item(script, flickr, bpe):
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    dataset = script.Dataset(df, script.build_transforms(32)[1], bpe)
    image, token_ids, labels = dataset[1]
    assert image.shape == (3, 32, 32)
    assert bpe.decode(token_ids) == CAPTIONS[1]
    assert labels == token_ids[1:] + token_ids[-1:]
    assert len(dataset) == len(df)


def test_all_captions_of_an_image_decide_about_mirroring(script, flickr, bpe):
    """Row 0 does not say left, but row 1 of the same photo does."""
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    seen = []

    def tfms(image, captions, seed):
        seen.append(captions)
        return {"image": torch.zeros(3, 2, 2)}

    script.Dataset(df, tfms, bpe)[0]
    assert seen == [list(CAPTIONS)]


def test_plain_albumentations_pipelines_work_too(script, flickr, bpe):
    A = pytest.importorskip("albumentations", exc_type=ImportError)
    from albumentations.pytorch import ToTensorV2

    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    tfms = A.Compose([A.Resize(16, 16), A.Normalize(), ToTensorV2()])
    assert script.Dataset(df, tfms, bpe)[0][0].shape == (3, 16, 16)


def test_workers_are_told_to_end_and_start_again():
    """Also those that wait for the next epoch; none is left to wait until it is noticed that nobody needs it."""
    loader = workers.Loader(range(40), 4, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        assert [int(batch[0]) for batch in loader] == list(range(0, 40, 4))
        processes = loader._iterator._workers
        if epoch == 0:
            pids = [process.pid for process in processes]
        assert (pids == [process.pid for process in processes]) == (epoch < 2)
        if epoch == 1:
            workers.end_workers()
            assert [process.exitcode for process in processes] == [0, 0]
    batches = iter(loader)
    next(batches)
    workers.end_workers()
    with pytest.raises(RuntimeError, match="a run ended, and with it the processes that were loading photos here"):
        list(batches)
    assert [process.exitcode for process in loader._iterator._workers] == [0, 0]


def test_workers_of_a_forgotten_loader_end(monkeypatch):
    """Those that garbage collection finds cannot be told; a process that waited for them at its end would never end."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = workers.Loader(range(8), 4, num_workers=2, persistent_workers=True)
    next(iter(loader))
    processes = loader._iterator._workers
    loader.cycle = loader
    del loader
    gc.collect()
    assert not any(process.is_alive() for process in processes)


def test_data_is_the_same_for_any_number_of_workers(script, dls, bpe):
    """Also with spawned workers, which get the dataset and its tokenizer by pickle."""
    plain = dls[0]
    options = dict(batch_sampler=plain.batch_sampler, collate_fn=plain.collate_fn)
    spawned = torch.utils.data.DataLoader(
        plain.dataset, num_workers=2, persistent_workers=True, multiprocessing_context="spawn", **options
    )
    for epoch in (0, 1):
        plain.dataset.set_epoch(epoch)
        plain.batch_sampler.set_epoch(epoch)
        batches = list(plain)
        for ours, theirs in zip(batches, list(spawned), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if epoch == 0:
            first = batches
    assert not torch.equal(first[0][0], batches[0][0])


def test_pixels_are_normalised_by_the_model(script, tiny_model, tiny_config, dls):
    """What loaders make are pixels, a quarter of the bytes; the model makes of them what `build_transforms` would."""
    images, ids, labels = next(iter(dls[1]))
    assert images.dtype == torch.uint8
    photo, path = tiny_model.preprocessing, dls[1].dataset.images[0]
    valid = script.build_transforms(photo["img_size"], photo["mean"], photo["std"])[1]
    first = valid(image=np.asarray(load_image(path)))["image"]
    normalized = normalize_pixels(images, tiny_model.preprocessing)
    torch.testing.assert_close(normalized[0], first, atol=0, rtol=0)
    assert torch.equal(normalize_pixels(first, tiny_model.preprocessing), first)
    assert torch.equal(tiny_model(images, ids, labels), tiny_model(normalized, ids, labels))
    assert torch.equal(tiny_model._encode_images(images)[:1], tiny_model._encode_images(first[None]))


def test_captions_that_are_too_long_are_said(script, flickr, bpe, tiny_config, tiny_train_config, capsys):
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    tiny_config.seq_len = longest = max(len(encode_caption(bpe, caption, 1000)) for caption in df["caption"])
    script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
    assert "seq_len" not in capsys.readouterr().out
    tiny_config.seq_len = longest - 1
    loader, _ = script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
    said = capsys.readouterr().out.splitlines()
    cut = sum(len(encode_caption(bpe, caption, 1000)) == longest for caption in loader.dataset.captions)
    assert 0 < cut < len(loader.dataset)
    assert said[0] == (
        f"warning: {cut} of 16 captions ({cut / 16:.0%}) have more than seq_len {longest - 1} tokens and are cut off "
        f"there; --seq_len {longest} would hold them all"
    )
