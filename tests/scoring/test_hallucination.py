"""What captions name that is not in the photo: the table of names, each source of the truth, and the shares."""

import json
from pathlib import Path

import pytest

from captioning.data import shapes
from captioning.scoring.hallucination import OBJECT_NAMES, ObjectNames, PhotoObjects


@pytest.fixture(scope="module")
def names():
    return ObjectNames()


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("two women and three children walk their puppies", ["person", "person", "dog"]),
        ("hot dogs beside a dog", ["hot dog", "dog"]),  # the longest name counts
        ("a baby elephant beside a baby", ["elephant", "person"]),
        ("a dog house by the train tracks", []),
        ("a man in an orange shirt holds an orange", ["person", "orange"]),
        ("oranges and mice on a dining table", ["orange", "mouse", "dining table"]),
        ("", []),
    ],
)
def test_objects_that_a_caption_names(names, caption, expected):
    assert names.mentions(caption) == expected


def test_the_table_has_the_categories_of_coco_and_each_name_once(names):
    assert len(set(names.category_of.values()) - {None}) == 80
    listed = [name.strip() for line in OBJECT_NAMES.read_text().splitlines() for name in line.split(",")]
    assert len(listed) == len(set(listed))


def totals(parts):
    return {name: value for part in parts for name, value in part.total().items()}


def coco(tmp_path, instances):
    content = {
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": instances,
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def test_coco_counts_instances_and_references(tmp_path):
    coco(tmp_path, [{"image_id": 7, "category_id": 1}, {"image_id": 8, "category_id": 2}])
    a, b = (tmp_path / "val2017" / name for name in ("a.jpg", "b.jpg"))
    objects = PhotoObjects({a: ["an animal on a bench"], b: ["a pet"]}, tmp_path)
    captions = {a: "a dog and a dog on a bench by a car", b: "a cat"}
    assert objects.absent(captions) == {a: ["car"]}
    # Five mentions, one of them wrong, in one of two captions; dog, bench and cat are there, and all are named.
    assert totals(objects.parts(captions)) == {"CHAIRi": 0.2, "CHAIRs": 0.5, "coverage": 1.0}
    assert totals(objects.parts({b: "a dog"})) == {"CHAIRi": 1.0, "CHAIRs": 0.5, "coverage": 0.0}


def test_without_instances_the_references_are_the_truth(tmp_path):
    photo = Path("a.jpg")
    objects = PhotoObjects({photo: ["a dog", "a puppy on a sofa"]}, tmp_path)
    assert totals(objects.parts({photo: "a dog and a cat"})) == {
        "CHAIRi by references": 0.5,
        "CHAIRs by references": 1.0,
        "coverage by references": 0.5,
    }
    assert objects.parts({photo: "something"}) == []  # no share of nothing


def test_shapes_are_checked_exactly(tmp_path):
    shapes.write_dataset(tmp_path / "shapes", 4)
    scenes = shapes.true_scenes(tmp_path / "shapes")
    truth = {Path(name): shapes.describe(scene, shapes.WORDINGS[0]) for name, scene in scenes.items()}
    objects = PhotoObjects({image: [caption] for image, caption in truth.items()}, tmp_path / "shapes")
    right = totals(objects.parts(truth))
    assert right == {
        "CHAIRi": 0.0,
        "CHAIRs": 0.0,
        "coverage": 1.0,
        "CHAIRi attributes": 0.0,
        "CHAIRs attributes": 0.0,
        "coverage attributes": 1.0,
    }
    image, scene = next((Path(name), scene) for name, scene in scenes.items())
    (_, colour, shape), _ = scene
    other = next(c for c in shapes.COLOURS if all((c, shape) != thing[1:] for thing in scene))
    missing = next(s for s in shapes.SHAPES if all(s != thing[2] for thing in scene))
    assert objects.absent({image: f"a {other} {shape} above a {colour} {shape}"})[image] == [f"{other} {shape}"]
    assert objects.absent({image: f"a {missing}"})[image] == [missing]


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"images": []}', "instances.json: not in COCO's format"),
        ("[]", "instances.json: holds"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_instances(tmp_path, content, told):
    path = tmp_path / "instances.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=told):
        PhotoObjects({Path("a.jpg"): ["a dog"]}, tmp_path, instances=path)


def test_instances_of_other_photos(tmp_path):
    coco(tmp_path, [])
    with pytest.raises(ValueError, match=r"instances_val2017.json: holds none of the 1 photos, such as c\.jpg"):
        PhotoObjects({Path("c.jpg"): ["a dog"]}, tmp_path, instances=tmp_path / "annotations/instances_val2017.json")


def test_a_table_without_names(tmp_path):
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(ValueError, match="no names of objects; expected lines"):
        ObjectNames(tmp_path / "names.txt")
