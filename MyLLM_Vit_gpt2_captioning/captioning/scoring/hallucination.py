"""Does a caption name what is not in the photo? CHAIR (Rohrbach et al. 2018, Object Hallucination in Image Captioning).

    CHAIRi    share of the objects named that are not in their photo, over all captions
    CHAIRs    share of captions that name an object that is not in the photo
    coverage  share of the objects in the photos that the captions name: a caption that says less is wrong less often

What is in a photo comes from
- Shapes: the scene itself, so the check is exact, for objects and for their attributes (size and colour of a shape);
- COCO: instances_*.json, and as in the paper the objects that a reference caption names;
- other photos: the reference captions alone. What no reference names can be in the photo all the same, so these scores
  are too high, and are called "by references".

Names of COCO's 80 categories are found in captions with a table of this project, object_names.txt, and not with the one
of the paper: numbers of papers are not comparable. The file of the paper has the same format and can be given instead.
"""

import re
from pathlib import Path

import numpy as np

from captioning.common.files import read_json
from captioning.data import shapes
from captioning.scoring import intervals
from captioning.scoring.ptb_tokenization import tokenize

OBJECT_NAMES = Path(__file__).with_name("object_names.txt")
IRREGULAR = {
    **{"man": "men", "woman": "women", "policeman": "policemen", "fireman": "firemen", "fisherman": "fishermen"},
    **{"gentleman": "gentlemen", "person": "people", "child": "children", "mouse": "mice", "knife": "knives"},
    **{"goose": "geese", "calf": "calves", "ox": "oxen", "pocketknife": "pocketknives", "sheep": "sheep"},
}
# Phrases that hold the name of an object and mean something else.
OTHER_THINGS = (
    *("home plate", "train track", "train station", "railroad track", "bus stop", "bus station", "car park", "jet ski"),
    *("ski lift", "ski slope", "ski pole", "ski jump", "ski resort", "skate park", "toilet paper", "dog house"),
    *("bird house", "bird cage", "chair lift", "apple tree", "orange tree", "phone booth", "telephone pole"),
    *("telephone booth", "table cloth", "table top", "bike rack", "bike path", "bike lane", "car seat", "truck bed"),
    *("flower bed", "river bed", "ball park", "ball game", "ball gown", "boat dock", "boat house"),
)
ANIMALS = {"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"}
# Behind "orange" the fruit; before another word it is a colour: "an orange shirt".
BEHIND_A_NOUN = {
    *("and", "or", "on", "in", "with", "is", "are", "sits", "sit", "sitting", "lies", "lie", "lying"),
    *("that", "next", "at", "of", "from", "by", "to", "for"),
}


class ObjectNames:
    """Finds the objects that a caption names.

    path: a line for each category, its name first, then other names, separated by commas; of two lines with one name
    the later counts. Raises ValueError that names a file without names.
    """

    def __init__(self, path=OBJECT_NAMES):
        self.category_of = dict.fromkeys(_forms(OTHER_THINGS))  # {(word, ...): category or None}
        own = {}
        for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            if names and names[0] in ANIMALS:  # a baby elephant is no baby
                names += [f"{age} {name}" for name in names for age in ("baby", "adult")]
            own |= dict.fromkeys(_forms(names), names[0] if names else None)
        if not own:
            raise ValueError(f"{path}: no names of objects; expected lines such as: bicycle, bike")
        self.category_of |= own
        self.longest = max(map(len, self.category_of))

    def mentions(self, tokenized):
        """A caption as `tokenize` returns it -> [category of each object it names, in order]; of names that overlap the
        longest counts: "a hot dog" is no dog."""
        words, found, i = tokenized.split(), [], 0
        while i < len(words):
            for length in range(min(self.longest, len(words) - i), 0, -1):
                form = tuple(words[i : i + length])
                if form in self.category_of:
                    is_colour = form == ("orange",) and not BEHIND_A_NOUN.issuperset(words[i + 1 : i + 2])
                    found.append(None if is_colour else self.category_of[form])
                    break
            i += length
        return [category for category in found if category is not None]


def _forms(names):
    """Names -> {(word, ...)}: each as it is and in the plural."""
    forms = set()
    for name in names:
        *first, last = name.split()
        forms |= {(*first, last), (*first, _plural(last))}
    return forms


def _plural(noun):
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


class PhotoObjects:
    """What is in the photos of a dataset, and what of it captions name.

    references: {image path: [captions]}. data: the dataset's folder. names: file of object names, see `ObjectNames`.
    instances: COCO's instances file; without it, annotations/instances_FOLDER.json or instances_FOLDER.json in `data`
    are looked for, where FOLDER is a folder of the photos (val2017). Raises OSError or ValueError that names a file
    that cannot be read.
    """

    def __init__(self, references, data, names=OBJECT_NAMES, instances=None):
        self.images = list(references)
        scenes = shapes.true_scenes(data)
        if all(image.name in scenes for image in self.images):
            self.kinds = ["", " attributes"]
            self.truth = [_scene_things(scenes[image.name]) for image in self.images]
            return
        self.names = ObjectNames(names)
        annotated = [instances] if instances else _instances_files(self.images, data)
        self.kinds = ["" if annotated else " by references"]
        captions = iter(tokenize([caption for captions in references.values() for caption in captions]))
        named = [{c for _ in texts for c in self.names.mentions(next(captions))} for texts in references.values()]
        in_photo = {}
        for path in annotated:
            in_photo |= _read_instances(path)
        if instances and not any(image.name in in_photo for image in self.images):
            raise ValueError(f"{instances}: holds none of the {len(self.images):,} photos, such as {self.images[0]}")
        pairs = zip(self.images, named, strict=True)
        self.truth = [(in_photo.get(image.name, set()) | objects,) for image, objects in pairs]

    def mentions(self, candidates):
        """{image: caption} -> for each image, for each kind of thing, the list of those that its caption names."""
        captions = [candidates.get(image, "") for image in self.images]
        if len(self.kinds) == 2:
            return [_scene_mentions(caption) for caption in captions]
        return [(self.names.mentions(caption),) for caption in tokenize(captions)]

    def absent(self, candidates):
        """{image: caption} -> {image: [what its caption names and the photo lacks, as text]}, where there is any."""
        found = {}
        for image, mentions, truth in zip(self.images, self.mentions(candidates), self.truth, strict=True):
            found[image] = sorted(set().union(*(set(m) - t for m, t in zip(mentions, truth, strict=True))))
        return {image: things for image, things in found.items() if things}

    def parts(self, candidates):
        """{image: caption} -> the `intervals.Part`s of CHAIRi, CHAIRs and coverage; none where no caption names any."""
        parts, mentions = [], self.mentions(candidates)
        for k, kind in enumerate(self.kinds):
            named, truth = [m[k] for m in mentions], [t[k] for t in self.truth]
            wrong = [sum(thing not in there for thing in things) for things, there in zip(named, truth, strict=True)]
            seen = [len(there & set(things)) for things, there in zip(named, truth, strict=True)]
            if any(named) and any(truth):
                parts += [
                    intervals.ratio_part(f"CHAIRi{kind}", wrong, list(map(len, named))),
                    intervals.mean_part(f"CHAIRs{kind}", np.array(wrong) > 0),
                    intervals.ratio_part(f"coverage{kind}", seen, list(map(len, truth))),
                ]
        return parts


def _scene_things(scene):
    """A scene of Shapes -> (the set of its objects, the set of their attributes)."""
    return {shape for *_, shape in scene}, {f"{word} {shape}" for *words, shape in scene for word in words}


def _scene_mentions(caption):
    """A caption of Shapes, however wrong -> ([shapes it names], [attributes of shapes it names])."""
    nouns = list(re.finditer(r"((?:\w+ )*?)({})\b".format("|".join(shapes.SHAPES)), caption))
    attributes = {*shapes.SIZES, *shapes.COLOURS}
    words = [(word, noun[2]) for noun in nouns for word in noun[1].split() if word in attributes]
    return [noun[2] for noun in nouns], [f"{word} {shape}" for word, shape in words]


def _instances_files(images, data):
    folders = dict.fromkeys(image.parent.name for image in images)
    tried = [Path(data) / place / f"instances_{name}.json" for name in folders for place in ("annotations", "")]
    return [path for path in tried if path.is_file()]


def _read_instances(path):
    """COCO's instances file -> {file name of each image: set of its categories}."""
    try:
        content = read_json(path)
        categories = {category["id"]: category["name"].lower() for category in content["categories"]}
        file_of = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        found = {name: set() for name in file_of.values()}
        for instance in content["annotations"]:
            found[file_of[instance["image_id"]]].add(categories[instance["category_id"]])
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not in COCO's format of instances ({error!r})") from error
