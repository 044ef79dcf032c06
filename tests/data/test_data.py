"""Annotation files, splits, transforms and batches."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from captioning.data import sources
from captioning.data.batching import CaptionBatchSampler, exact_captions_per_image
from captioning.data.splits import assign_splits
from captioning.images.augmentation import may_mirror, random_crop_box
from captioning.images.preprocessing import load_image, preprocess
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


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match="2 image"):
        assign_splits(pd.Series(["1.jpg", "2.jpg", "2.jpg"]), tmp_path)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_validation_transform_is_the_plain_preprocessing(script, photo):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    valid_tfms = script.build_transforms(32, mean, std)[1]
    expected = np.array(Image.fromarray(photo).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((expected - mean) / std).permute(2, 0, 1).float()
    tensor = valid_tfms(image=photo)["image"]
    assert torch.equal(tensor, preprocess(photo, 32, mean, std))
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_default_normalisation_is_one_half(script):
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    for tfms in script.build_transforms(8)[1:]:
        torch.testing.assert_close(tfms(image=white)["image"], torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on the left", False),
        ("a RIGHT-handed player", False),
        ("the rightmost car", False),
        ("a sign that reads stop", False),
        ("a bright light", True),
        ("a man in a copyright office", True),
        ("the logo of a team", False),
        ("", True),
    ],
)
def test_what_may_be_mirrored(caption, expected):
    assert may_mirror(["a plain caption", caption]) is expected


def test_training_transform_mirrors_only_when_true(script, photo):
    """Over many seeds: a picture whose red half is on the left stays that way when a caption says left."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:, :16, 0] = 255
    train_tfms = script.build_transforms(32)[0]

    def mirrored(caption):
        images = [train_tfms(image=picture, captions=[caption], seed=[seed])["image"] for seed in range(40)]
        return sum(bool(image[0, :, :8].mean() < image[0, :, -8:].mean()) for image in images)

    assert mirrored("red on the left") == 0
    assert 8 < mirrored("something red") < 32


@pytest.mark.parametrize("shape", [(40, 60), (20, 60), (60, 20), (48, 48)])
def test_crops_keep_what_they_promise(shape):
    height, width = shape
    generator, areas, aspects = np.random.default_rng(0), [], []
    for _ in range(300):
        left, top, right, bottom = random_crop_box(generator, width, height, 0.8)
        assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
        areas.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top) / (width / height))
    Image.new("RGB", (width, height)).resize((8, 8), box=random_crop_box(generator, width, height, 1.0))
    assert min(areas) >= 0.8 - 1e-9
    assert max(areas) > 0.97
    assert 0.75 < min(aspects) < 0.9 and 1.1 < max(aspects) < 1.34


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_a_crop_of_everything_is_the_validation_image(script, photo, resample):
    """Training resamples as validation does: without crop, mirror and light the pixels are the same, but for rounding
    in another kernel. On photos, larger and smaller than the model's, at most one level of 255 nearly everywhere."""
    for pixels in (photo, photo[:20, :20], np.asarray(Image.fromarray(photo).resize((300, 200)))):
        train_tfms, valid_tfms = script.build_transforms(32, crop_scale=1.0, resample=resample)
        train_tfms.mirrored = train_tfms.unmirrored
        plain = valid_tfms(image=pixels)["image"]
        differences = [train_tfms(image=pixels, seed=[seed])["image"] - plain for seed in range(10)]
        levels = min(differences, key=lambda difference: difference.abs().sum()).abs() * 255 / 2  # pixels are -1..1
        assert levels.mean() < 0.1
        assert levels.max() < 3


def test_training_transform_keeps_hue(script):
    """Brightness and contrast may change; a pure red stays the only channel that is on."""
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 200
    for seed in range(30):
        image = script.build_transforms(16)[0](image=red, seed=[seed])["image"] * 0.5 + 0.5
        assert image[0].min() > 0.5
        assert image[1:].max() < 0.2


def test_augmentation_depends_on_its_seed_only(script, photo):
    first, second = (script.build_transforms(32)[0] for _ in range(2))
    second(image=photo, seed=[9])
    a, b = (tfms(image=photo, seed=[0, 1, 2])["image"] for tfms in (first, second))
    assert torch.equal(a, b)
    assert not torch.equal(a, first(image=photo, seed=[0, 2, 2])["image"])


def test_load_image_turns_photos_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_decoding_keeps_the_picture(tmp_path, mode, turn):
    """A photo of 800 x 600 is decoded at a quarter for at least 150 pixels, and still upright, with its colours."""
    smooth = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(smooth).resize((800, 600), Image.Resampling.BICUBIC).convert(mode)
    picture.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    full, reduced = load_image(tmp_path / "photo.jpg"), load_image(tmp_path / "photo.jpg", least_side=150)
    assert full.mode == reduced.mode == "RGB"
    assert full.size == ((800, 600) if turn in (1, 3) else (600, 800))
    assert reduced.size == (full.width // 4, full.height // 4)
    expected, pixels = (np.asarray(image.resize((50, 50)), dtype=float) for image in (full, reduced))
    assert np.abs(expected - pixels).mean() < 2
    assert load_image(tmp_path / "photo.jpg", least_side=301).size == full.size  # half of it would be too small


def test_least_side_changes_no_other_format(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for source in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png"), photo):
        assert np.array_equal(load_image(source, least_side=4), photo)


def test_load_image_leaves_an_opened_photo_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    opened = Image.open(tmp_path / "turned.jpg")
    assert load_image(opened).size == (20, 40)
    assert opened.size == (40, 20)


def test_only_training_decodes_reduced_photos(script, tmp_path, photo, bpe):
    """A validation photo is pixel for pixel what `preprocess` makes of the file, whatever its size."""
    Image.fromarray(photo).resize((600, 500), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    df = pd.DataFrame({"image": [tmp_path / "large.jpg"], "caption": ["a dog"]})
    train_tfms, valid_tfms = script.build_transforms(32)
    image = script.Dataset(df, valid_tfms, bpe)[0][0]
    assert torch.equal(image, preprocess(tmp_path / "large.jpg", 32, (0.5,) * 3, (0.5,) * 3))
    sizes = []

    def watched(image, captions, seed):
        sizes.append(image.shape[:2])
        return train_tfms(image=image, captions=captions, seed=seed)

    watched.least_side = train_tfms.least_side
    assert script.Dataset(df, watched, bpe)[0][0].shape == (3, 32, 32)
    assert sizes == [(125, 150)]  # a quarter; an eighth would have less than twice the 32 pixels


def test_bad_images_are_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(ValueError, match=r"broken\.jpg: not a readable image"):
        load_image(tmp_path / "broken.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such image"):
        load_image(tmp_path / "gone.jpg")


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


def test_validation_counts_each_caption_once():
    assert exact_captions_per_image(list("aabb"), 2) == 2
    assert exact_captions_per_image(list("aabbb"), 2) == 1


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
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    tfms = A.Compose([A.Resize(16, 16), A.Normalize(), ToTensorV2()])
    assert script.Dataset(df, tfms, bpe)[0][0].shape == (3, 16, 16)


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
    torch.testing.assert_close(tiny_model._normalized(images)[0], first, atol=0, rtol=0)
    assert torch.equal(tiny_model._normalized(first), first)
    assert torch.equal(tiny_model(images, ids, labels), tiny_model(tiny_model._normalized(images), ids, labels))
    assert torch.equal(tiny_model._encode_images(images)[:1], tiny_model._encode_images(first[None]))
