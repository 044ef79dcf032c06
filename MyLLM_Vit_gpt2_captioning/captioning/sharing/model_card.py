"""The model card of a shared captioner (Mitchell et al. 2019): what it is, what it was trained on, what was measured.

Only what files beside the checkpoint say is written, and only where they belong to these very weights.
"""

import csv
import html
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from captioning.common.files import WEIGHTS_FILE
from captioning.model.checkpoint import load_config

NO_LICENSE = "other"
DATASETS = {  # beginning of a folder's name -> what it is
    "flickr30k": "Flickr30k (Young et al. 2014), photos with five captions each",
    "flickr8k": "Flickr8k (Hodosh et al. 2013), photos with five captions each",
    "coco": "MS COCO (Lin et al. 2014), photos with five captions each",
    "shapes": "Shapes, the project's built-in data set: rendered scenes of coloured shapes with captions that are true "
    "by construction",
}
METRICS = ("perplexity", "bleu", "rouge", "cider", "meteor", "spice", "exact_answers")  # beginnings of names of scores
RECIPE = {  # constants that are shown; the rest is in recipe.toml
    "epochs": "epochs with cross-entropy",
    "scst_epochs": "epochs of self-critical training",
    "freeze_epochs_gpt": "epochs before the pretrained GPT-2 blocks train",
    "freeze_epochs_all": "epochs before everything trains",
    "lr": "peak learning rate of new layers",
    "pretrained_lr_scale": "pretrained layers learn at this share of it",
    "batch_size": "captions a batch",
    "accumulate": "batches a step",
    "captions_per_image": "captions that share one encoding of their image",
    "weight_decay": "weight decay (AdamW)",
    "ema_decay": "decay of the moving average of the weights",
    "crop_scale": "smallest share of a photo's area that a training crop keeps",
    "precision": "precision",
    "seed": "seed",
}
SAMPLES = 8  # captions that the card shows


@dataclass
class Sample:
    """A caption for the card, with what is true of the image, or with its picture."""

    name: str
    caption: str
    truth: list = field(default_factory=list)
    file: str = ""  # of the picture in the shared folder
    picture: bytes = b""


@dataclass
class Facts:
    """What is known about a checkpoint."""

    repo_id: str
    config: dict  # of config.json
    row: dict = field(default_factory=dict)  # of metrics.csv, of the epoch that was kept
    metrics_csv: str = ""
    scores: dict = field(default_factory=dict)  # {what was scored: content of a scores.json}
    samples: list = field(default_factory=list)
    datasets: list = field(default_factory=list)
    guessed: bool = False  # nobody has said so: the data sets are those that the run's folders are named after
    license: str = NO_LICENSE
    converted_from: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_facts(folder, repo_id, license=NO_LICENSE, datasets=None, scores_files=None):
    """What the files of a run say about the checkpoint in `folder` -> `Facts`.

    `datasets`: names; by default those that are found in the paths of the training configuration. `scores_files`:
    scores.json files of evaluate_captions.py; by default those in `folder`/evaluation_*, unless they are older than
    the weights. Raises FileNotFoundError or ValueError that names the file.
    """
    folder = Path(folder)
    config = load_config(folder)
    facts = Facts(repo_id, config, license=license or NO_LICENSE)
    facts.datasets = list(datasets or _datasets_in(config.get("train_config", {})))
    facts.guessed = not datasets
    facts.metrics_csv, facts.row = _read_metrics(folder / "metrics.csv", config)
    if scores_files is None:
        written = (folder / WEIGHTS_FILE).stat().st_mtime if (folder / WEIGHTS_FILE).is_file() else 0
        scores_files = []
        for path in sorted(folder.glob("evaluation_*/scores.json")):
            if path.stat().st_mtime >= written:
                scores_files.append(path)
            else:
                print(f"{path}: older than the weights, so it is not in the model card")
    for path in map(Path, scores_files):
        try:
            facts.scores[path.parent.name.replace("evaluation_", "split ")] = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a scores.json of evaluate_captions.py ({error}); make it again") from error
    if facts.row:
        facts.samples = _read_samples(folder / "samples.md", facts.row["epoch"])
    return facts


def _datasets_in(train_config):
    """Known data sets that a folder or file of the run is named after: flickr8k, flickr30k_256, vqa_shapes, ..."""
    paths = [str(train_config.get(key, "")).lower() for key in ("data_dir", "image_dir", "captions_file")]
    names = [part for path in paths for part in re.split(r"[/\\]", path)]
    return [known for known in DATASETS if any(re.fullmatch(rf"(vqa_)?{known}(\d{{4}})?([_.-].*)?", n) for n in names)]


def _read_metrics(path, config):
    """metrics.csv -> (its text, the row of the epoch that was kept as {name: text}); ("", {}) where there is none, or
    where it belongs to other weights."""
    epoch, best = config.get("best_epoch"), config.get("best_perplexity")
    if not path.is_file() or epoch is None or best is None:
        return "", {}
    text = path.read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        try:
            if int(row["epoch"]) == epoch + 1 and math.isclose(float(row["valid_perplexity"]), best, rel_tol=1e-6):
                return text, row
        except (KeyError, TypeError, ValueError):
            break
    print(f"{path}: says nothing of these weights, so it is not shared")
    return "", {}


def _read_samples(path, epoch):
    """samples.md -> what its images were called in the epoch `epoch` (text), or [] where that is not in it."""
    samples = []
    if path.is_file():
        for part in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            caption = re.search(rf"^\| {epoch} \| (.*) \|$", part, re.M)
            if caption:
                truth = re.findall(r"^- true: (.*)$", part, re.M)
                samples.append(Sample(part.splitlines()[0], caption[1].replace(r"\|", "|"), truth))
    return samples[:SAMPLES]


def picture(image, path, caption, number):
    """A photo for the card -> `Sample`. Pixels only are kept, no larger than 512: no place, no date, no name."""
    import numpy as np
    from PIL import Image

    plain = Image.fromarray(np.asarray(image))
    plain.thumbnail((512, 512))
    kind = "png" if Path(path).suffix.lower() == ".png" else "jpg"
    file = io.BytesIO()
    plain.save(file, "PNG" if kind == "png" else "JPEG", **({} if kind == "png" else {"quality": 90}))
    return Sample(f"sample {number}", caption, file=f"samples/sample_{number}.{kind}", picture=file.getvalue())


# --- writing ----------------------------------------------------------------------------------------------------------


def write_card(facts, parameters):
    """-> the text of README.md with YAML front matter. `parameters`: how many numbers the weights are."""
    name = facts.repo_id.partition("/")[2]
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {name}\n\n{_what_it_is(facts, parameters)}",
        f"## Use it\n\n{_use(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Measured\n\n{_measured(facts)}",
    ]
    if facts.samples:
        parts.append(f"## Samples\n\n{_samples(facts)}")
    parts += [f"## Limits\n\n{_limits(facts)}", f"## Licence\n\n{_license(facts)}"]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts):
    from huggingface_hub import ModelCardData

    other = dict(license_name="not-stated") if facts.license == NO_LICENSE else {}
    encoder = str(facts.config["model_config"].get("encoder", ""))
    data = ModelCardData(
        license=facts.license, **other, pipeline_tag="image-to-text", library_name="pytorch",
        tags=["image-captioning", "gpt2", *(["vit"] if "vit" in encoder else []), "safetensors"],
        datasets=facts.datasets or None, metrics=_metric_names(facts) or None,
    )  # fmt: skip
    return data.to_yaml().strip()


def _metric_names(facts):
    names = {name.lower().replace(" ", "_").replace("valid_", "") for name in _row_scores(facts)}
    names |= {
        name.lower().replace(" ", "_") for scores in facts.scores.values() for name, v in scores.items() if _number(v)
    }
    return [metric for metric in METRICS if any(name.startswith(metric) for name in names)]


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _what_it_is(facts, parameters):
    model = facts.config["model_config"]
    size, depth = facts.config["preprocessing"].get("img_size"), model.get("depth")
    coupling = {
        "stepped": "decoder block *i* attends to the image as the encoder sees it at that depth",
        "final": "all decoder blocks attend to the encoder's last layer",
    }.get(model.get("coupling", "stepped"))
    options = model.get("encoder_options")
    changed = f", changed by `{json.dumps(options)}`," if options else ""
    text = (
        f"An image captioner of {parameters:,} parameters. The encoder `{model.get('encoder')}`{changed} looks at the "
        f"photo ({size} x {size} pixels), a GPT-2-style decoder of {depth} blocks, {model.get('embed_dim')} channels "
        f"and {model.get('vocab_size'):,} tokens writes the caption; {coupling}."
    )
    if "exact_answers" in facts.row:
        text += "\n\nIt answers questions about an image: give it one with `--prompt`."
    if facts.converted_from:
        text += f"\n\nThe weights are those of `{facts.converted_from}` under other names; it was not trained further."
    return text


def _use(facts):
    return f"""Without the project, with the source that lies beside the weights:

```
hf download {facts.repo_id} --local-dir captioner
pip install -r captioner/requirements.txt
python captioner/example.py photo.jpg
```

In a checkout of the project:

```
python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --checkpoint {facts.repo_id}
```"""


def _training(facts):
    model, train = facts.config["model_config"], facts.config.get("train_config", {})
    known = [DATASETS.get(name, name) for name in facts.datasets]
    how = ", by the name of its folder" if facts.guessed and known else ""
    lines = [f"Data set{how}: {'; '.join(known) if known else 'not stated'}."]
    starts = {
        "the encoder": "from random weights" if model.get("encoder_weights") == "scratch" else "pretrained",
        "the decoder": "from random weights" if model.get("decoder_weights") == "scratch" else "pretrained",
    }
    if model.get("start_from"):
        lines.append(f"It went on from the captioner `{model['start_from']}`.")
    elif not facts.converted_from:
        lines.append("Started: " + ", ".join(f"{part} {how}" for part, how in starts.items()) + ".")
    if not train:
        return "\n\n".join(lines)
    rows = ["| constant | value | |", "| --- | --- | --- |"]
    rows += [f"| `{key}` | {train[key]} | {what} |" for key, what in RECIPE.items() if key in train]
    lines += ["\n".join(rows), "All constants are in `recipe.toml`, which repeats the run: `--recipe recipe.toml`."]
    if facts.config.get("best_epoch") is not None:
        lines.append(
            f"These weights are those after epoch {facts.config['best_epoch'] + 1}, the best one when they were shared."
        )
    return "\n\n".join(lines)


def _row_scores(facts):
    """{name: value} that metrics.csv, or config.json, says of the epoch that was kept."""
    names = ("valid_perplexity", "CIDEr", "BLEU-4", "exact_answers")
    found = {}
    for name in names:
        try:
            found[name] = float(facts.row.get(name) or "nan")
        except ValueError:
            found[name] = math.nan
    if not facts.row and facts.config.get("best_perplexity") is not None:
        found["valid_perplexity"] = float(facts.config["best_perplexity"])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _measured(facts):
    images = facts.config.get("train_config", {}).get("score_images")
    scored = f"greedy captions of {f'at most {images} ' if images else ''}validation images"
    of = {
        "valid_perplexity": ("perplexity per token", "all captions of the validation split"),
        "CIDEr": ("CIDEr-D", scored),
        "BLEU-4": ("BLEU-4", scored),
        "exact_answers": ("share of answers that are right to the letter", "validation questions"),
    }
    parts, found = [], _row_scores(facts)
    if found:
        rows = ["| score | value | of |", "| --- | ---: | --- |"]
        rows += [f"| {of[name][0]} | {value:.4f} | {of[name][1]} |" for name, value in found.items()]
        parts.append("On the validation split, which also decided which epoch was kept:\n\n" + "\n".join(rows))
    for what, scores in facts.scores.items():
        from captioning.scoring.evaluation import table_rows

        (_, *head), *rest = table_rows(scores)
        lines = [f"| | {head[0]} | {head[1]} |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {_cell(value)} | {beside} |" for name, value, beside in rest]
        shuffled = "; `shuffled` is the same with the captions dealt to other images" if "shuffled" in scores else ""
        parts.append(f"`evaluate_captions.py`, {what}{shuffled}:\n\n" + "\n".join(lines))
    if not facts.scores:
        parts.append("There are no scores of a test split.")
    return "\n\n".join(parts)


def _cell(text):
    """Text for a cell of a Markdown table, as it is: no markup in it counts."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "&#124;")


def _samples(facts):
    if facts.samples[0].file:
        lines = ["| image | caption |", "| --- | --- |"]
        lines += [f'| <img src="{s.file}" width="160"> | {_cell(s.caption)} |' for s in facts.samples]
        return "Greedy captions of images that were chosen by whoever published the model:\n\n" + "\n".join(lines)
    lines = ["| image | caption | one of its true captions |", "| --- | --- | --- |"]
    for s in facts.samples:
        lines.append(f"| {_cell(s.name)} | {_cell(s.caption)} | {_cell(s.truth[0] if s.truth else '')} |")
    return (
        "Greedy captions of the first images of the validation split (the images themselves are not shared):\n\n"
        + "\n".join(lines)
    )


def _limits(facts):
    if facts.datasets == ["shapes"]:
        return (
            "It knows rendered scenes of coloured shapes and nothing else: any other picture, a photo too, is "
            "described as if it were one."
        )
    return (
        "It writes what the captions it was trained on would say, in their language and with their habits and "
        "prejudices, also about people. It can name things that are not in the photo, and nothing in a caption says "
        "how sure it is. Photos unlike those of its data set are described worse; how much worse was not measured. Do "
        "not base decisions about people on it."
    )


def _license(facts):
    weights = (
        "The licence of the weights has not been stated; it depends on the data set and on the weights they started "
        "from, so ask whoever published them before you use them."
        if facts.license == NO_LICENSE
        else f"Weights: {facts.license}, as stated by whoever published them."
    )
    return f"{weights}\n\nThe code in `source/`: see `source/LICENSE` (Apache-2.0)."
