"""The model card of a shared captioner (Mitchell et al. 2019): description, training data and scores.

It states only what the files beside the checkpoint say, and only where they belong to exactly these weights.
"""

import csv
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from captioning.common.files import WEIGHTS_FILE
from captioning.common.printable import from_markdown, in_markdown
from captioning.model.checkpoint import load_config

NO_LICENSE = "other"
DATASETS = {  # beginning of a folder's name: description of the data set
    "flickr30k": "Flickr30k (Young et al. 2014), photos with five captions each",
    "flickr8k": "Flickr8k (Hodosh et al. 2013), photos with five captions each",
    "coco": "MS COCO (Lin et al. 2014), photos with five captions each",
    "shapes": "Shapes, the project's built-in data set: rendered scenes of coloured shapes with captions that are true "
    "by construction",
}
METRICS = ("perplexity", "bleu", "rouge", "cider", "meteor", "spice", "exact_answers")  # prefixes of names of scores
RECIPE = {  # constants in the card, with a description; recipe.toml has all
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
MAX_SAMPLES = 8  # captions in the card


@dataclass
class CardSample:
    """A generated caption for the card, with the image's reference captions, or with the image itself."""

    name: str
    caption: str
    references: list = field(default_factory=list)
    file: str = ""  # the image's path in the shared folder
    image: bytes = b""  # the content of that file


@dataclass
class Facts:
    """Everything that the card states about a checkpoint."""

    repo_id: str
    config: dict  # the content of config.json
    row: dict = field(default_factory=dict)  # the row of metrics.csv of the epoch that was kept
    metrics_csv: str = ""  # the whole file
    scores: dict = field(default_factory=dict)  # {what was scored: content of a scores.json}
    samples: list = field(default_factory=list)  # of `CardSample`
    datasets: list = field(default_factory=list)  # names
    guessed: bool = False  # the data sets are guessed from the names of the run's folders
    license: str = NO_LICENSE
    converted_from: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_facts(folder, repo_id, license=NO_LICENSE, datasets=None, scores_files=None):
    """Collect the `Facts` about the checkpoint in `folder` from the files of its run.

    `datasets`: names; by default those found in the paths of the training configuration. `scores_files`: scores.json
    files of evaluate_captions.py; by default those in `folder`/evaluation_* that are not older than the weights.
    Raises FileNotFoundError or ValueError that names the file.
    """
    folder = Path(folder)
    config = load_config(folder)
    facts = Facts(repo_id, config, license=license or NO_LICENSE)
    facts.datasets = list(datasets or _datasets_in(config.get("train_config", {})))
    facts.guessed = not datasets
    facts.metrics_csv, facts.row = _read_metrics(folder / "metrics.csv", config)
    if scores_files is None:
        weights_time = (folder / WEIGHTS_FILE).stat().st_mtime if (folder / WEIGHTS_FILE).is_file() else 0
        scores_files = []
        for path in sorted(folder.glob("evaluation_*/scores.json")):
            if path.stat().st_mtime >= weights_time:
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
    """The known data sets whose names folders or files of the run have: flickr8k, flickr30k_256, vqa_shapes, ..."""
    paths = [str(train_config.get(key, "")).lower() for key in ("data_dir", "image_dir", "captions_file")]
    names = [part for path in paths for part in re.split(r"[/\\]", path)]
    return [known for known in DATASETS if any(re.fullmatch(rf"(vqa_)?{known}(\d{{4}})?([_.-].*)?", n) for n in names)]


def _read_metrics(path, config):
    """metrics.csv -> (its text, the row of the epoch that was kept as {column: text}); ("", {}) if there is no such
    file or it belongs to other weights."""
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
    print(f"{path}: has no row for these weights, so it is not shared")
    return "", {}


def _read_samples(path, epoch):
    """samples.md -> list of `CardSample` with the captions of the epoch `epoch` (text); [] if they are not in it."""
    samples = []
    if path.is_file():
        for section in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            caption = re.search(rf"^\| {epoch} \| (.*) \|$", section, re.M)
            if caption:
                references = re.findall(r"^- true: (.*)$", section, re.M)
                name, caption, *references = map(from_markdown, [section.splitlines()[0], caption[1], *references])
                samples.append(CardSample(name, caption, references))
    return samples[:MAX_SAMPLES]


def photo_sample(image, path, caption, number):
    """A photo (PIL image, from the file `path`) and its caption -> `CardSample`.

    Only its pixels are kept, at most 512 a side: no metadata and no file name.
    """
    import numpy as np
    from PIL import Image

    pixels = Image.fromarray(np.asarray(image))
    pixels.thumbnail((512, 512))
    is_png = Path(path).suffix.lower() == ".png"
    content = io.BytesIO()
    pixels.save(content, "PNG" if is_png else "JPEG", **({} if is_png else {"quality": 90}))
    file = f"samples/sample_{number}.{'png' if is_png else 'jpg'}"
    return CardSample(f"sample {number}", caption, file=file, image=content.getvalue())


# --- writing ----------------------------------------------------------------------------------------------------------


def write_card(facts, parameters):
    """-> the text of README.md, with YAML front matter. `parameters`: number of parameters of the model."""
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

    license_name = dict(license_name="not-stated") if facts.license == NO_LICENSE else {}
    encoder = str(facts.config["model_config"].get("encoder", ""))
    data = ModelCardData(
        license=facts.license,
        **license_name,
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        tags=["image-captioning", "gpt2", *(["vit"] if "vit" in encoder else []), "safetensors"],
        datasets=facts.datasets or None,
        metrics=_metric_names(facts) or None,
    )
    return data.to_yaml().strip()


def _metric_names(facts):
    """Those of METRICS of which the card has a value."""
    names = {name.replace("valid_", "") for name in _row_scores(facts)}
    for scores in facts.scores.values():
        names |= {name for name, value in scores.items() if _is_finite_number(value)}
    names = {name.lower().replace(" ", "_") for name in names}
    return [metric for metric in METRICS if any(name.startswith(metric) for name in names)]


def _is_finite_number(value):
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
    return f"""With transformers 5 or newer, which runs the source code beside the weights:

```python
from transformers import pipeline

captioner = pipeline("image-text-to-text", model="{facts.repo_id}", trust_remote_code=True)
print(captioner(images="photo.jpg", text="")[0]["generated_text"])
```

`text` is the caption's first words, or a question if the model answers them. Without transformers, with the same code:

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
    datasets = [DATASETS.get(name, name) for name in facts.datasets]
    source = ", by the name of its folder" if facts.guessed and datasets else ""
    lines = [f"Data set{source}: {'; '.join(datasets) if datasets else 'not stated'}."]
    if model.get("start_from"):
        lines.append(f"Training continued from the captioner `{model['start_from']}`.")
    elif not facts.converted_from:
        encoder, decoder = (
            "from random weights" if model.get(key) == "scratch" else "pretrained"
            for key in ("encoder_weights", "decoder_weights")
        )
        lines.append(f"Initialisation: the encoder {encoder}, the decoder {decoder}.")
    if not train:
        return "\n\n".join(lines)
    rows = ["| constant | value | |", "| --- | --- | --- |"]
    rows += [f"| `{key}` | {train[key]} | {description} |" for key, description in RECIPE.items() if key in train]
    lines += ["\n".join(rows), "All constants are in `recipe.toml`, which repeats the run: `--recipe recipe.toml`."]
    if facts.config.get("best_epoch") is not None:
        lines.append(
            f"These weights are those after epoch {facts.config['best_epoch'] + 1}, the best one when they were shared."
        )
    return "\n\n".join(lines)


def _row_scores(facts):
    """{name: value} of the scores of the epoch that was kept, from metrics.csv or config.json."""
    scores = {}
    for name in ("valid_perplexity", "CIDEr", "BLEU-4", "METEOR", "exact_answers"):
        try:
            scores[name] = float(facts.row.get(name) or "nan")
        except ValueError:
            scores[name] = math.nan
    if not facts.row and facts.config.get("best_perplexity") is not None:
        scores["valid_perplexity"] = float(facts.config["best_perplexity"])
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _measured(facts):
    images = facts.config.get("train_config", {}).get("score_images")
    captions = f"greedy captions of {f'at most {images} ' if images else ''}validation images"
    labels = {  # name: (title, what was scored)
        "valid_perplexity": ("perplexity per token", "all captions of the validation split"),
        "CIDEr": ("CIDEr-D", captions),
        "BLEU-4": ("BLEU-4", captions),
        "METEOR": ("METEOR", captions),
        "exact_answers": ("share of answers that are right to the letter", "validation questions"),
    }
    parts, row_scores = [], _row_scores(facts)
    if row_scores:
        rows = ["| score | value | of |", "| --- | ---: | --- |"]
        rows += [f"| {labels[name][0]} | {value:.4f} | {labels[name][1]} |" for name, value in row_scores.items()]
        parts.append("On the validation split, which also decided which epoch was kept:\n\n" + "\n".join(rows))
    for what, scores in facts.scores.items():
        from captioning.scoring.evaluation import table_rows

        (_, *head), *rest = table_rows(scores)
        lines = [f"| | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
        lines += [
            f"| {name} | {_cell(value)} | {' | '.join(others)} |".replace("|  |", "| |")
            for name, value, *others in rest
        ]
        shuffled = "; `shuffled` is the same with the captions dealt to other images" if "shuffled" in scores else ""
        parts.append(f"`evaluate_captions.py`, {what}{shuffled}:\n\n" + "\n".join(lines))
    if not facts.scores:
        parts.append("There are no scores of a test split.")
    return "\n\n".join(parts)


def _cell(text):
    """Text -> the same text for a cell of a Markdown table, with all markup escaped."""
    return in_markdown(" ".join(str(text).split()))


def _samples(facts):
    if facts.samples[0].file:
        lines = ["| image | caption |", "| --- | --- |"]
        lines += [f'| <img src="{s.file}" width="160"> | {_cell(s.caption)} |' for s in facts.samples]
        return "Greedy captions of images that were chosen by whoever published the model:\n\n" + "\n".join(lines)
    lines = ["| image | caption | one of its true captions |", "| --- | --- | --- |"]
    for s in facts.samples:
        lines.append(f"| {_cell(s.name)} | {_cell(s.caption)} | {_cell(s.references[0] if s.references else '')} |")
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
