"""Shapes: the built-in dataset. Rendered scenes of two objects, with captions that are true by construction.

A scene has one object above another; each is small or large, has one of six colours and one of four shapes. Because
the truth is known, a caption is not scored by its words but checked: is every attribute right? Six pairs of colours
are held out of training: they show whether a model has learnt what it sees or only what usually goes together.

The files lie in the Flickr30k layout (`results.csv`, a folder of photos, a Karpathy split file), so that the reader,
transforms and loader are those of a real dataset. The same scenes also come with questions and answers
(`captions.jsonl` with the columns image, prompt, caption and split).
"""

import json
import random
import re
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from captioning.common.stopping import stop_if_asked

SIZES = {"small": 6, "large": 10}  # radius in pixels of a 48-pixel scene
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Colours (on top, at the bottom) that training never shows together; it shows them the other way round.
HELD_OUT = {
    ("red", "green"),
    ("green", "blue"),
    ("blue", "yellow"),
    ("yellow", "purple"),
    ("purple", "white"),
    ("white", "red"),
}

# The first word tells which object comes first, so that no caption begins with a coin toss between the two.
WORDINGS = (
    "a {top} above a {bottom}",
    "there is a {bottom} below a {top}",
    "above a {bottom} is a {top}",
    "below a {top} is a {bottom}",
)
SCENE_PIXELS = 48
CAPTIONS_PER_SCENE = 2
QUESTIONS_PER_SCENE = 8
SPLIT_FILE = "dataset_shapes.json"
IMAGE_FOLDER = "images"

_OBJECT = "({}) ({}) ({})".format("|".join(SIZES), "|".join(COLOURS), "|".join(SHAPES))
_PATTERNS = [
    (re.compile(wording.format(top=_OBJECT, bottom=_OBJECT)), wording.index("{top}") < wording.index("{bottom}"))
    for wording in WORDINGS
]


def draw_scene(rng, held_out):
    """A random scene ((size, colour, shape) on top, (size, colour, shape) at the bottom).

    `held_out`: whether the two colours are a pair of `HELD_OUT`.
    """
    while True:
        scene = tuple((rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(2))
        if held_out == ((scene[0][1], scene[1][1]) in HELD_OUT):
            return scene


def render_scene(rng, scene):
    """Draw the scene at a random place on a random grey background -> RGB image of 48 x 48 pixels."""
    return render_with_boxes(rng, scene)[0]


def render_with_boxes(rng, scene):
    """As `render_scene` -> (image, the boxes (left, top, right, bottom) of its two objects in pixels)."""
    scale = 4  # drawn four times as large and reduced: smooth edges
    grey = rng.randint(60, 150)
    image = Image.new("RGB", (SCENE_PIXELS * scale,) * 2, (grey, grey, grey))
    draw, boxes = ImageDraw.Draw(image), []
    for (size, colour, shape), middle in zip(scene, (13, 35), strict=True):
        radius = SIZES[size] + rng.uniform(-0.7, 0.7)
        x, y = rng.uniform(14, SCENE_PIXELS - 14), middle + rng.uniform(-1.5, 1.5)
        tint = tuple(max(0, min(255, channel + rng.randint(-15, 15))) for channel in COLOURS[colour])
        box = _draw_shape(draw, shape, x * scale, y * scale, radius * scale, tint)
        boxes.append(tuple(side / scale for side in box))
    return image.resize((SCENE_PIXELS,) * 2, Image.Resampling.LANCZOS), boxes


def _draw_shape(draw, shape, x, y, radius, fill):
    """One shape centred at (x, y), about `radius` pixels in each direction -> its box (left, top, right, bottom)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        box = tuple(v + 0.1 * radius * sign for v, sign in zip(box, (1, 1, -1, -1), strict=True))
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)
    else:
        arm = radius * 0.35
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    return box


def describe(scene, wording):
    """The caption of a scene in one of `WORDINGS`."""
    top, bottom = (" ".join(thing) for thing in scene)
    return wording.format(top=top, bottom=bottom)


def parse_caption(caption):
    """A caption in any of the wordings -> the scene it describes; None when it describes no scene."""
    for pattern, top_first in _PATTERNS:
        match = pattern.fullmatch(caption.strip())
        if match:
            first, second = match.groups()[:3], match.groups()[3:]
            return (first, second) if top_first else (second, first)
    return None


def exact_rate(captions, scenes):
    """Share of captions (0..1) that are right in every attribute of both objects and in which is above the other."""
    return sum(parse_caption(c) == scene for c, scene in zip(captions, scenes, strict=True)) / len(scenes)


def right_words(words, scene):
    """For each word of a caption whether it is the true one at its place: in the wording that has the most of them."""
    truths = [describe(scene, wording).split() for wording in WORDINGS]
    matches = [[i < len(truth) and word == truth[i] for i, word in enumerate(words)] for truth in truths]
    return max(matches, key=sum)


def chance_level():
    """The share that guessing each attribute at random would get right."""
    return 1 / (len(SIZES) * len(COLOURS) * len(SHAPES)) ** 2


def questions(rng, scene):
    """Questions about a scene that have one right answer -> list of (question, answer), in random order."""
    pairs = []
    for (size, colour, shape), other in (scene, scene[::-1]):
        if (size, shape) != (other[0], other[2]):
            pairs.append((f"what colour is the {size} {shape} ?", colour))
        if (size, colour) != other[:2]:
            pairs.append((f"what shape is the {size} {colour} thing ?", shape))
        if (colour, shape) != other[1:]:
            pairs.append((f"what size is the {colour} {shape} ?", size))
    top, bottom = (" ".join(thing) for thing in scene)
    if top != bottom:
        pairs += [(f"what is above the {bottom} ?", top), (f"what is below the {top} ?", bottom)]
    seen = {thing[1:] for thing in scene}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in seen]
    for (colour, shape), answer in ((rng.choice(sorted(seen)), "yes"), (rng.choice(absent), "no")):
        pairs.append((f"is there a {colour} {shape} ?", answer))
    rng.shuffle(pairs)
    return pairs


def write_dataset(folder, train_scenes, seed=0):
    """Render Shapes into `folder` (replaced as a whole) unless it already holds just this dataset.

    Beside `train_scenes` there are 1/12 as many validation scenes, 1/6 test scenes and 1/12 test scenes with held-out
    combinations, at least 2 each. The split file also holds the truth of each scene.
    """

    def rows(rng, image):
        return [
            f"{image['filename']}| {number}| {describe(image['scene'], wording)}"
            for number, wording in enumerate(rng.sample(WORDINGS, CAPTIONS_PER_SCENE))
        ]

    settings = {"version": 6, "train_scenes": train_scenes, "seed": seed}
    _write(folder, settings, rows, "results.csv", header="image_name| comment_number| comment\n")


def write_questions(folder, train_scenes, seed=0):
    """As `write_dataset` with questions and answers in place of captions, in `captions.jsonl`."""

    def rows(rng, image):
        return [
            json.dumps(dict(image=image["filename"], prompt=question, caption=answer, split=image["split"]))
            for question, answer in questions(rng, image["scene"])[:QUESTIONS_PER_SCENE]
        ]

    settings = {"questions": QUESTIONS_PER_SCENE, "train_scenes": train_scenes, "seed": seed}
    _write(folder, settings, rows, "captions.jsonl")


def _write(folder, settings, rows_of, captions_file, header=""):
    """Write scenes, the split file, and the captions file with the lines `rows_of(rng, image)` of each scene, unless
    the folder already has them with the same `settings`."""
    folder = Path(folder)
    split_file = folder / SPLIT_FILE
    if split_file.is_file() and json.loads(split_file.read_text(encoding="utf-8")).get("settings") == settings:
        return
    rng = random.Random(settings["seed"])
    scenes = settings["train_scenes"]
    parts = [  # split, held-out combinations, number of scenes
        ("train", False, scenes),
        ("val", False, scenes // 12),
        ("test", False, scenes // 6),
        ("test", True, scenes // 12),
    ]
    draft = folder.with_name(folder.name + ".part")  # renamed when complete: an interrupted run leaves no half dataset
    shutil.rmtree(draft, ignore_errors=True)
    (draft / IMAGE_FOLDER).mkdir(parents=True)
    images, rows = [], []
    for split, held_out, count in parts:
        for _ in range(max(count, 2)):
            scene = draw_scene(rng, held_out)
            name = f"scene_{len(images):05d}.png"
            render_scene(rng, scene).save(draft / IMAGE_FOLDER / name)
            images.append({"filename": name, "split": split, "scene": scene, "held_out": held_out})
            rows += rows_of(rng, images[-1])
            stop_if_asked()
    (draft / captions_file).write_text(header + "\n".join(rows) + "\n")
    (draft / SPLIT_FILE).write_text(json.dumps({"dataset": "shapes", "settings": settings, "images": images}))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def true_scenes(folder):
    """The scenes of all images in `folder` -> {file name: scene}; empty where it does not hold Shapes."""
    split_file = Path(folder) / SPLIT_FILE
    if not split_file.is_file():
        return {}
    images = json.loads(split_file.read_text(encoding="utf-8"))["images"]
    return {image["filename"]: tuple(tuple(thing) for thing in image["scene"]) for image in images}


def read_scenes(folder, held_out):
    """The test scenes with held-out combinations, or those without -> (list of image paths, list of their scenes)."""
    folder = Path(folder)
    images = json.loads((folder / SPLIT_FILE).read_text(encoding="utf-8"))["images"]
    chosen = [image for image in images if image["split"] == "test" and image["held_out"] == held_out]
    scenes = [tuple(tuple(thing) for thing in image["scene"]) for image in chosen]
    return [folder / IMAGE_FOLDER / image["filename"] for image in chosen], scenes


def scores_of(caption, folder, questions=False):
    """{"scores": those of `score`, or with `questions` of `score_answers`}; {} for a folder of another dataset."""
    if not (Path(folder) / SPLIT_FILE).is_file():
        return {}
    return {"scores": (score_answers if questions else score)(caption, folder)}


def score(caption, folder):
    """Share of captions of test scenes that are right in every attribute -> dict; prints it beside the chance level.

    `caption` takes a list of paths to a list of captions.
    """
    paths, scenes = read_scenes(folder, held_out=False)
    captions = caption(paths)
    new_paths, new_scenes = read_scenes(folder, held_out=True)
    scores = {
        "unseen scenes": exact_rate(captions, scenes),
        "unseen combinations of attributes": exact_rate(caption(new_paths), new_scenes),
        "images shuffled among scenes": exact_rate(captions[1:] + captions[:1], scenes),
        "chance level": chance_level(),
    }
    print(f"captions right in every attribute ({len(scenes):,} and {len(new_scenes):,} scenes, greedy):")
    for name, value in scores.items():
        print(f"    {name:40s} {value:8.2%}")
    return scores


def score_answers(answer, folder):
    """Share of right answers to all questions about test scenes -> dict; prints it beside the share with shuffled
    images, which needs no look at them.

    `answer(paths, prompt=questions)` gives a list of answers.
    """
    rng = random.Random(0)
    scores, by_kind = {}, {}
    for name, held_out in (("unseen scenes", False), ("unseen combinations of attributes", True)):
        paths, scenes = read_scenes(folder, held_out)
        asked = [(path, *pair) for path, scene in zip(paths, scenes, strict=True) for pair in questions(rng, scene)]
        images, prompts, truth = zip(*asked, strict=True)
        answers = answer(list(images), prompt=list(prompts))
        scores[name] = _share(answers, truth)
        if not held_out:
            shuffled = answer([*images[len(images) // 2 :], *images[: len(images) // 2]], prompt=list(prompts))
            scores["images shuffled among questions"] = _share(shuffled, truth)
            for prompt, given, right in zip(prompts, answers, truth, strict=True):
                by_kind.setdefault(" ".join(prompt.split()[:2]), []).append(given == right)
    print("right answers to questions about test scenes (greedy):")
    for name, value in [*scores.items(), *((f"    {kind} ...", sum(v) / len(v)) for kind, v in by_kind.items())]:
        print(f"    {name:40s} {value:8.2%}")
    return scores


def _share(answers, truth):
    return sum(given == right for given, right in zip(answers, truth, strict=True)) / len(truth)
