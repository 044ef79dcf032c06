"""report.html: one page that shows how a run goes, written after every epoch and at the end.

It uses only what the run has computed anyway, such as the captions that were scored, so it takes seconds. The page is
one file with its pictures inside, which loads nothing from elsewhere: it can be mailed.
"""

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.data

from captioning.common.files import CURVES
from captioning.common.printable import in_html
from captioning.model.tokenizer import CaptionTokenizer, encode_caption
from captioning.pages import html_pages

SHOWN = 8  # best and worst captions
EPOCHS_SHOWN = 8  # of the samples; samples.md has them all
LIBRARIES = ("torch", "timm", "transformers", "tokenizers", "albumentations", "numpy", "pandas", "pillow", "matplotlib")
SCORES = ("valid_perplexity", "CIDEr", "exact_answers")
NAMES = {  # of the columns of metrics.csv
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "train_perplexity": "training perplexity",
    "valid_perplexity": "validation perplexity",
    "lr": "learning rate",
    "exact_answers": "right answers",
    "BLEU-4": "BLEU\u20114",  # with a hyphen that does not break
}

STYLE = """
body { background: #f6f8fa; }
header { margin-bottom: 1.4em; } header p { margin: 0; color: #59636e; }
section { background: #fff; border: 1px solid #d9dee3; border-radius: 8px; padding: 1em 1.4em 1.2em; margin: 1.1em 0; }
h2 { margin: 0 0 0.6em; } h3 { font-size: 1em; margin: 1.2em 0 0.6em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9em, 1fr)); gap: 0.9em; }
.tiles div { background: #fff; border: 1px solid #d9dee3; border-radius: 8px; padding: 0.7em 1em; }
.tiles b { display: block; font-size: 1.45em; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span { color: #59636e; font-size: 13px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21em, 100%), 1fr)); gap: 1em; }
.curves img { border-radius: 0; }
.wide { overflow-x: auto; } .wide table { width: 100%; font-size: 13.5px; }
.wide td, .wide th { border-bottom: 1px solid #e6e9ec; padding: 0.35em 0.5em; } .wide th { vertical-align: bottom; }
.wide td { white-space: nowrap; }
tr.best td { font-weight: 600; background: #eef6ee; } tr.total td { font-weight: 600; }
.photos { grid-template-columns: repeat(auto-fill, minmax(min(15em, 47%), 1fr)); gap: 1.2em; }
figcaption table { font-size: 13px; margin: 0.5em 0 0; } figcaption td { padding: 0.1em 0.7em 0.1em 0; }
figcaption td:first-child { color: #59636e; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5em, 1fr)); gap: 0.8em; }
.words figcaption { text-align: center; font-size: 14px; }
.constants { columns: 24em; column-gap: 2.5em; margin: 0; font-size: 13.5px; }
.constants div { display: flex; gap: 1em; justify-content: space-between; break-inside: avoid;
  border-bottom: 1px solid #e6e9ec; padding: 0.2em 0; }
.constants dt { color: #59636e; } .constants dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.note { color: #59636e; font-size: 13px; margin: 0.4em 0 0; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


@dataclass
class Run:
    """What the report shows of a run, beside its log."""

    tokenizer: CaptionTokenizer
    dataset: torch.utils.data.Dataset  # the validation captions, a `Dataset` of the script
    configs: dict  # {"model": dict, "train": dict}, as `checkpoint.portable` gives them
    summary: tuple  # (head, rows) of `summary.summarize`
    autocast: Callable  # of `mixed_precision`


def write_report(path, log, run, model):
    """The page of a run so far, from its `RunLog`, its `Run` and the `VisionGPT2Model` with the weights to look at.

    Raises OSError that names `path` where it cannot be written.
    """
    if not log.rows:
        return
    config, device = model.config, model.gpt.tok_emb.weight.device
    decoder = f"{config.depth} decoder blocks of {config.embed_dim} channels"
    epochs = run.configs["train"]["epochs"] + run.configs["train"]["scst_epochs"]
    done, written = log.rows[-1]["epoch"], time.strftime("%Y-%m-%d %H:%M")
    title = f"Training report: {log.folder.resolve().name}"
    head, rows = run.summary
    sections = {
        "Curves": _curves(log),
        "Epochs": _epochs(log),
        "The same photos after every epoch": _samples(log, run.dataset),
        **_best_and_worst(log, run.dataset),
        "Where it looks for each word": _attention(log, run, model),
        "Diagnosis": _diagnosis(log.diagnosis),
        "Model": _table(head, rows, numbers=2, classes={len(rows) - 1: "total"})
        + "<p class=note>Behind the number of a part's parameters: how many of them train in which stage.</p>",
        "Constants": _constants(run.configs),
        "Environment": _pairs(environment(device, run.autocast)),
    }
    parts = [
        f"<header><h1>{in_html(title)}</h1><p>{in_html(f'{config.encoder}, {decoder}')}; "
        f"after epoch {done} of {epochs}, written {written}</p></header>",
        _tiles(log, model),
    ]
    parts += [f"<section><h2>{in_html(name)}</h2>{body}</section>" for name, body in sections.items() if body]
    html_pages.write_page(path, title, parts, STYLE)


def first_rows(keys, dataset):
    """(image, question) pairs of a caption dataset -> the first row of each, which is the same in a resumed run."""
    first = {}
    for row, key in enumerate(zip(dataset.images, dataset.prompts, strict=True)):
        first.setdefault(key, row)
    return [first[key] for key in keys]


def environment(device, autocast):
    """Device, precision and versions of libraries -> {name: text}. Nothing in it names the machine or its user."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = _processor() if device.type == "cpu" else str(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    with autocast():
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else torch.float32
    return {
        "device": name,
        "precision": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


# --- the parts of the page: each returns HTML, "" where there is nothing to show --------------------------------------


def _tiles(log, model):
    best = log.best_row() or log.rows[-1]
    tiles = {f"best epoch, by {log.best_by}": str(best["epoch"])}
    tiles |= {NAMES.get(key, key): _number(key, best[key]) for key in best if key in SCORES}
    tiles["parameters"] = _short(sum(parameter.numel() for parameter in model.parameters()))
    speeds = [speed for row in log.timings if (speed := captions_per_second(row))]
    if speeds:
        tiles["captions a second"] = f"{sorted(speeds)[len(speeds) // 2]:,.1f}"
    if log.timings:
        tiles["time so far"] = _duration(sum(row["training"] + row["evaluation"] for row in log.timings))
    cells = (f"<div><b>{in_html(value)}</b><span>{in_html(name)}</span></div>" for name, value in tiles.items())
    return f"<div class=tiles>{''.join(cells)}</div>"


def captions_per_second(timing):
    """A row of timings.csv -> captions trained on a second; None where it is not known."""
    captions = timing.get("captions")  # rows from before this was counted have none
    return captions / timing["training"] if captions and timing["training"] else None


def _curves(log):
    from captioning.pages.plots import curve_as_svg  # the first use of matplotlib takes a while

    quantities = ["loss", "perplexity", "lr", "BLEU-4", "METEOR", *CURVES[2:]]
    pictures = []
    for quantity in quantities:
        if quantity in ("loss", "perplexity") or any(quantity in row for row in log.rows):
            address = html_pages.data_url("image/svg+xml", curve_as_svg(log.rows, quantity, log.points).encode())
            pictures.append(f'<img src="{address}" alt="{quantity} by epoch">')
    return f"<div class=curves>{''.join(pictures)}</div>"


def _epochs(log):
    keys = list(dict.fromkeys(key for row in log.rows for key in row))
    timings = {row["epoch"]: row for row in log.timings}
    rows = []
    for row in log.rows:
        timing = timings.get(row["epoch"], {})
        speed = captions_per_second(timing) if timing else None
        durations = [_duration(timing[part]) if timing else "" for part in ("training", "evaluation")]
        metrics = [_number(key, row[key]) if key in row else "" for key in keys]
        rows.append([*metrics, *durations, f"{speed:,.1f}" if speed else ""])
    head = [*(NAMES.get(key, key) for key in keys), "training", "evaluation", "captions/s"]
    best = log.best_row()
    classes = {log.rows.index(best): "best"} if best else {}
    return _table(head, rows, numbers=2, classes=classes)


def _samples(log, dataset):
    """The first scored photos, with what they were called after some of the epochs."""
    newest = log.newest
    if not log.samples or not newest:
        return ""
    epochs = list(log.samples)
    if len(epochs) > EPOCHS_SHOWN:
        last = len(epochs) - 1
        epochs = [epochs[round(i * last / (EPOCHS_SHOWN - 1))] for i in range(EPOCHS_SHOWN)]
    truth, parts = _truth(dataset), ["<div class=photos>"]
    for i, row in enumerate(newest["rows"][: len(log.samples[epochs[-1]])]):
        image, prompt = dataset.images[row], dataset.prompts[row]
        called = "".join(
            f"<tr><td class=number>{epoch}</td><td>{in_html(log.samples[epoch][i]) or '(empty)'}</td></tr>"
            for epoch in epochs
            if i < len(log.samples[epoch])
        )
        true = "".join(f"<li>{in_html(text)}</li>" for text in truth[image, prompt])
        parts.append(
            f'<figure><img src="{html_pages.photo_url(image)}" alt=""><figcaption>'
            f"{f'<b>{in_html(prompt)}</b>' if prompt else ''}<ul>{true}</ul><table>{called}</table>"
            "</figcaption></figure>"
        )
    return "".join([*parts, "</div>"])


def _best_and_worst(log, dataset):
    """-> {heading: HTML} of the captions of the best epoch: by their CIDEr, answers by whether they are right."""
    if not log.scored:
        return {}
    from captioning.scoring.evaluation import cider_of_each

    truth, after = _truth(dataset), f"after epoch {log.scored['epoch']}"
    keys = [(dataset.images[row], dataset.prompts[row]) for row in log.scored["rows"]]
    captions = dict(zip(keys, log.scored["captions"], strict=True))
    if log.questions:
        right = [key for key in keys if captions[key] in truth[key]]
        wrong = [key for key in keys if captions[key] not in truth[key]]
        groups, shown = {"Right answers": right[:SHOWN], "Wrong answers": wrong[:SHOWN]}, {}
    else:
        each = cider_of_each(captions, truth, log.config.score_tokens)
        order = sorted(keys, key=lambda key: -each[key])
        groups = {"Best captions": order[:SHOWN], "Worst captions": order[SHOWN:][::-1][:SHOWN]}
        shown = {key: f"CIDEr {each[key]:.2f}" for key in keys}
    return {
        f"{name} {after}": html_pages.photo_grid(
            (key[0], f"{key[1]} {captions[key]}".strip(), truth[key], shown.get(key, "")) for key in group
        )
        for name, group in groups.items()
        if group
    }


def _attention(log, run, model):
    """Cross-attention's maps for the caption of the first scored photo."""
    newest, dataset = log.newest, run.dataset
    if not newest:
        return ""
    from captioning.decoding.attention_maps import overlay, word_maps

    row, caption, model = newest["rows"][0], newest["captions"][0], model.eval()
    ids = encode_caption(run.tokenizer, caption, model.config.seq_len, dataset.prompts[row])
    with run.autocast():
        words, maps = word_maps(model, run.tokenizer, dataset.images[row], ids)
    pictures = [("", html_pages.photo_url(dataset.images[row]))]
    pictures += [
        (word, html_pages.thumbnail(overlay(dataset.images[row], at))) for word, at in zip(words, maps, strict=True)
    ]
    figures = (
        f'<figure><img src="{address}" alt=""><figcaption>{in_html(word)}</figcaption></figure>'
        for word, address in pictures
    )
    note = "Cross-attention's weights, means over all blocks and heads; the brightest cell is the largest of its word."
    return f"<div class=words>{''.join(figures)}</div><p class=note>{note}</p>"


def written_and_true(scored, dataset):
    """`RunLog.newest` or `scored` -> (its captions, for each the list of true captions of its photo)."""
    truth = _truth(dataset)
    return scored["captions"], [truth[dataset.images[row], dataset.prompts[row]] for row in scored["rows"]]


def _diagnosis(diagnosis):
    """What was found, and all that was measured to find it."""
    found = "".join(
        f"<li><b>{in_html(finding.name)}</b>: {in_html(finding.seen)}. Likely cause: {in_html(finding.cause)}. "
        f"Try: {in_html(finding.remedy)}.</li>"
        for finding in diagnosis.findings
    )
    return (f"<ul>{found}</ul>" if found else "<p>Nothing was found.</p>") + _pairs(dict(diagnosis.rows()))


def _constants(configs):
    parts = []
    for name, config in (("Model", configs["model"]), ("Training", configs["train"])):
        values = {key: _plain(value) for key, value in config.items()}
        parts.append(f"<h3>{name}</h3>{_pairs(values)}")
    return "".join(parts) + "<p class=note>recipe.toml, beside this page, repeats the run.</p>"


def _plain(value):
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _pairs(values):
    pairs = (f"<div><dt>{in_html(k)}</dt><dd>{in_html(v) or '&ndash;'}</dd></div>" for k, v in values.items())
    return f"<dl class=constants>{''.join(pairs)}</dl>"


def _table(head, rows, numbers, classes=None):
    """Cells of text -> HTML; from column `numbers` on to the right. `classes`: {place of a row: its class}."""

    def line(cells, tag):
        shown = (
            f"<{tag}{' class=number' if i >= numbers else ''}>{in_html(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return "".join(shown)

    body = (f'<tr class="{(classes or {}).get(i, "")}">{line(row, "td")}</tr>' for i, row in enumerate(rows))
    return f"<div class=wide><table><tr>{line(head, 'th')}</tr>{''.join(body)}</table></div>"


def _truth(dataset):
    """{(image, question or ""): its true captions or answers}."""
    truth = {}
    for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
        truth.setdefault((image, prompt), []).append(caption)
    return truth


def _number(key, value):
    if isinstance(value, str) or key == "epoch":
        return str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.1e}" if key == "lr" else f"{value:.3f}"


def _short(count):
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _duration(seconds):
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
