"""The built-in dataset: true captions, an honest score, files that are whole."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from captioning.data import shapes
from captioning.data.conventions import RESULTS_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_dataset(folder, train_scenes=60)
    return folder


def test_every_wording_describes_its_scene():
    rng = random.Random(0)
    for _ in range(50):
        scene = shapes.draw_scene(rng, held_out=False)
        for wording in shapes.WORDINGS:
            assert shapes.parse_caption(shapes.describe(scene, wording)) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a small red circle",
        "a small red circle above a large blue square and more",
        "a tiny red circle above a large blue square",
    ],
)
def test_other_text_describes_nothing(caption):
    assert shapes.parse_caption(caption) is None


def test_exact_rate_wants_every_attribute():
    scene = (("small", "red", "circle"), ("large", "blue", "square"))
    right = "there is a large blue square below a small red circle"
    wrong = [
        "a large red circle above a large blue square",
        "there is a small red circle below a large blue square",
        "a small red circle above a large blue cross",
        "a small green circle above a large blue square",
        "",
    ]
    assert shapes.exact_rate([right], [scene]) == 1
    assert shapes.exact_rate(wrong, [scene] * 5) == 0
    assert shapes.exact_rate([right, *wrong[:3]], [scene] * 4) == 0.25


def test_training_never_shows_held_out_combinations(folder):
    images = json.loads((folder / shapes.SPLIT_FILE).read_text())["images"]

    def held_out(image):
        (_, top, _), (_, bottom, _) = image["scene"]
        return (top, bottom) in shapes.HELD_OUT

    assert not any(held_out(image) for image in images if image["split"] in ("train", "val"))
    assert all(held_out(image) == image["held_out"] for image in images)
    assert {pair[::-1] for pair in shapes.HELD_OUT}.isdisjoint(shapes.HELD_OUT)  # shown the other way round


def test_the_flickr_reader_reads_it(script, folder):
    df = script._load_flickr_dataframe(folder, folder / shapes.IMAGE_FOLDER)
    assert df.groupby("split")["image"].nunique().to_dict() == {"train": 60, "val": 5, "test": 15}
    assert (df.groupby("image").size() == shapes.CAPTIONS_PER_SCENE).all()
    truth = dict(zip(*shapes.read_scenes(folder, held_out=False), strict=True))
    rows = df[df["image"].isin(truth)]
    assert len(rows) == 20
    assert all(shapes.parse_caption(row.caption) == truth[row.image] for row in rows.itertuples())


def test_pictures_show_their_scene():
    """At the place of each object there are pixels of its colour, and more of them when it is large."""
    rng = random.Random(1)

    def coloured(image, colour, half):
        box = (0, 24 * half, 48, 24 * half + 24)
        wanted = shapes.COLOURS[colour]
        pixels = np.asarray(image.crop(box)).reshape(-1, 3).tolist()
        return sum(all(abs(a - b) < 40 for a, b in zip(pixel, wanted, strict=True)) for pixel in pixels)

    for shape in shapes.SHAPES:
        for colour in shapes.COLOURS:
            other = "blue" if colour != "blue" else "red"
            scene = (("small", colour, shape), ("large", other, shape))
            image = shapes.render_scene(rng, scene)
            assert image.size == (48, 48)
            assert 15 < coloured(image, colour, half=0) < coloured(image, other, half=1)
            assert coloured(image, other, half=0) < 10


def test_dataset_is_made_once_and_remade_when_settings_change(tmp_path):
    folder = tmp_path / "shapes"
    shapes.write_dataset(folder, train_scenes=24)
    results = folder / RESULTS_FILE
    first, written = results.read_text(), results.stat().st_mtime_ns
    shapes.write_dataset(folder, train_scenes=24)
    assert results.stat().st_mtime_ns == written
    shapes.write_dataset(folder, train_scenes=36)
    assert len(results.read_text()) > len(first)
    shapes.write_dataset(folder, train_scenes=24)
    assert results.read_text() == first
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # no draft is left behind
    assert Image.open(next((folder / shapes.IMAGE_FOLDER).iterdir())).size == (48, 48)


def test_boxes_hold_the_objects():
    """What is not background lies in a box, but for the smooth edge, and each box is filled up to its sides."""
    rng = random.Random(4)
    for _ in range(40):
        scene = shapes.draw_scene(rng, held_out=False)
        state = rng.getstate()
        image, boxes = shapes.render_with_boxes(rng, scene)
        rng.setstate(state)
        assert shapes.render_scene(rng, scene).tobytes() == image.tobytes()
        pixels = np.asarray(image).astype(int)
        object_at = (abs(pixels - pixels[0, 0]).max(-1) > 40).nonzero()  # rows, columns
        for (left, top, right, bottom), (_, _, shape) in zip(boxes, scene, strict=True):
            inside = (object_at[1] >= left - 1) & (object_at[1] < right + 1)
            inside &= (object_at[0] >= top - 1) & (object_at[0] < bottom + 1)
            found = [side[inside] for side in object_at]
            sides = found[1].min(), found[0].min(), found[1].max() + 1, found[0].max() + 1
            assert np.abs(np.subtract(sides, (left, top, right, bottom))).max() < 2.6, shape
            object_at = [side[~inside] for side in object_at]
        assert len(object_at[0]) == 0
