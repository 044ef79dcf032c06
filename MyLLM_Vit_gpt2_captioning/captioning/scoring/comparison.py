"""Systems side by side: differences of their scores with intervals, and the images whose captions changed most."""

from captioning.scoring import intervals, metrics
from captioning.scoring.evaluation import cider_of_each


def check_same_images(systems):
    """systems: {name: {image: caption}}. Raises ValueError that names the systems and images where the sets differ."""
    (first, captions), *others = systems.items()
    for name, other in others:
        for one, two, missing in ((name, first, captions.keys() - other), (first, name, other.keys() - captions)):
            if missing:
                shown = ", ".join(sorted(str(getattr(image, "name", image)) for image in missing)[:3])
                raise ValueError(
                    f"{one} has no caption of {len(missing)} images that {two} has ({shown}); only captions of the "
                    "same images can be compared: make them with the same --split and --max_images"
                )


def compare_systems(systems, references, by="words", more_parts=lambda captions: []):
    """systems: two or more {name: {image: caption}} of the same images; references: {image: [captions]} -> [(first
    name, other name, result of `intervals.compare`), ...]: every other system against the first. `by` as in `metrics`.

    `more_parts`: {image: caption} -> `intervals.Part`s of further scores. Raises ValueError when the images of the
    systems differ.
    """
    check_same_images(systems)
    references = {image: references[image] for image in next(iter(systems.values()))}
    (first, own), *others = [(name, metrics.parts(c, references, by) + more_parts(c)) for name, c in systems.items()]
    return [(first, name, intervals.compare(own, parts)) for name, parts in others]


def most_changed(systems, references, count, by="words"):
    """The images with different captions whose CIDEr differs most -> [(image, [(name, caption, CIDEr), ...]), ...]."""
    images = list(next(iter(systems.values())))
    references = {image: references[image] for image in images}
    ciders = {name: cider_of_each(captions, references, by) for name, captions in systems.items()}

    def spread(image):
        values = [cider[image] for cider in ciders.values()]
        return max(values) - min(values)

    changed = [image for image in images if len({captions[image] for captions in systems.values()}) > 1]
    chosen = sorted(changed, key=lambda image: -spread(image))[:count]
    return [(i, [(name, systems[name][i], ciders[name][i]) for name in systems]) for i in chosen]


def comparison_rows(first, other, result):
    """A result of `intervals.compare` -> table rows of text, the header first."""
    rows = [("", first, other, "difference", "95% interval", "p")]
    for name, of in result.items():
        low, high = of["interval"]
        scores = (f"{score:.4f}" for score in of["scores"])
        rows.append((name, *scores, f"{of['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{of['p']:.3f}"))
    return rows
