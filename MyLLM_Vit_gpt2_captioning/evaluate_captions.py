"""Caption every image of a split and score the captions with the usual metrics: BLEU, ROUGE-L, CIDEr, METEOR, SPICE.

    python MyLLM_Vit_gpt2_captioning/evaluate_captions.py captioner --data data/flickr8k --split test --beam 4
    python MyLLM_Vit_gpt2_captioning/evaluate_captions.py --predictions results.json --data data/coco2017 --split val

Prints a table and writes to --output:
    scores.json        the table
    predictions.json   [{"image_id": ..., "caption": ...}], COCO's results format, which other tools score too
    page.html          photos with their captions, best and worst first
--predictions scores the captions of another model, in a file of that format. METEOR and SPICE need Java.
--diagnose looks for what is wrong with the captioner and the dataset instead, and prints what it measured.
"""

import json
import re
import sys
from pathlib import Path

import torch

from captioning.command_line.arguments import ToolParser, integer
from captioning.command_line.decoding_options import add_decoding_arguments, decoding_options
from captioning.common.files import write_atomically
from captioning.common.precision import mixed_precision
from captioning.data import batching, sources
from captioning.data.conventions import SPLITS
from captioning.data.token_cache import TokenCache, fill_caches
from captioning.pages import html_pages
from captioning.scoring.evaluation import as_table, cider_of_each, exact_answers, predict, score, table_rows
from captioning.training import diagnosis, measurements
from MyLLM_Vit_gpt2_captioning import (
    DATA_DIR,
    OUTPUT_DIR,
    Dataset,
    build_transforms,
    collate_fn,
    load_captioner,
    train_config,
)

SHOWN = 40  # best and worst photos on the page


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default=OUTPUT_DIR, help="folder or hub id (default: captioner)")
    parser.add_argument("--data", type=Path, default=DATA_DIR, metavar="FOLDER", help="dataset (default: data)")
    parser.add_argument("--captions_file", type=Path, help="the annotation file, if it is not found in the folder")
    parser.add_argument("--image_dir", type=Path, help="the folder with the photos, if they are elsewhere")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    parser.add_argument("--max_images", type=integer(1), metavar="N", help="only the first N images of the split")
    parser.add_argument("--batch_size", type=integer(1), default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these captions instead of a model's")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: CHECKPOINT/evaluation_SPLIT)")
    parser.add_argument("--cache_dir", type=Path, metavar="FOLDER", help="use the token cache in this folder")
    parser.add_argument("--diagnose", action="store_true", help="look for faults of captioner and dataset instead")
    add_decoding_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return diagnose(args) if args.diagnose else evaluate_split(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def evaluate_split(args):
    """Caption and score as the parsed command line says -> scores.

    Raises OSError or ValueError that names the file or the option and a remedy.
    """
    options = decoding_options(args)
    rows = read_split(args)
    parent = args.predictions.parent if args.predictions else Path(args.checkpoint)
    output = args.output or (parent if parent.is_dir() else Path(parent.name)) / f"evaluation_{args.split}"
    references = rows.groupby("image", sort=False)["caption"].agg(list).to_dict()
    images, finished = list(references), None
    if args.predictions and "prompt" in rows:
        raise ValueError(f"{args.data} asks questions; --predictions scores captions")
    if args.predictions:
        candidates = read_predictions(args.predictions, images)
    else:
        caption = load_predictor(args, images, options)
        if "prompt" in rows:
            return score_answers(rows, caption, output)
        captions, finished = caption(images)
        candidates = dict(zip(images, captions, strict=True))
    scores = score(candidates, references, finished)
    _write(output, scores, [dict(image_id=image_id(image), caption=caption) for image, caption in candidates.items()])
    title = f"{args.predictions or args.checkpoint}: {args.split}"
    write_page(output / "page.html", title, scores, candidates, references)
    print(f"scores, predictions and a page to look at: {output}")
    return scores


def diagnose(args):
    """Look at a captioner and a dataset, print what is wrong with them -> list of `diagnosis.Finding`."""
    model, tokenizer = load_captioner(args.checkpoint)
    model.to(train_config.device)
    rows, config = read_split(args), model.config
    df = sources.drop_unusable(sources.load(args.data, args.captions_file, args.image_dir), args.data)
    photo = model.preprocessing
    _, tfms = build_transforms(photo["img_size"], photo["mean"], photo["std"], resample=photo["resample"])
    training, split = (Dataset(part, tfms, tokenizer, 1, config.seq_len) for part in (df[df["split"] == "train"], rows))
    first = list({image: row for row, image in reversed(list(enumerate(split.images)))}.values())[: measurements.PHOTOS]
    batch = collate_fn(split.__getitems__(first), tokenizer)
    images = list(split.captions_of)[:100]
    captions, _ = load_predictor(args, images, decoding_options(args))(images)
    autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)
    written = captions, [split.captions_of[image] for image in images]
    batch = batching.to_device(batch, train_config.device)
    found = diagnosis.of_captioner(model, training, split, batch, written, autocast, train_config)
    print(found.as_table())
    return found.findings


def load_predictor(args, images, options):
    """Load the captioner -> a function (images, prompts="") -> (captions, for each whether it ended with EOS).

    With --cache_dir the encoder's tokens of `images` are computed once and then read from the token cache.
    """
    model, tokenizer = load_captioner(args.checkpoint)
    model.to(train_config.device)
    autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)
    load_batch = None
    if args.cache_dir:
        cache = TokenCache(args.cache_dir, model, precision=args.precision)
        fill_caches(model, [(cache, images, None)])
        load_batch = cache.batch

    def caption(images, prompts=""):
        with autocast():
            return predict(
                model, tokenizer, images, prompts, batch_size=args.batch_size, load_batch=load_batch, **options
            )

    return caption


def score_answers(rows, caption, output):
    """Answer the questions in `rows`, write scores and predictions to `output` -> {"exact answers": share}."""
    references = rows.groupby(["image", "prompt"], sort=False)["caption"].agg(list).to_dict()
    images, questions = map(list, zip(*references, strict=True))
    answers, _ = caption(images, questions)
    entries = zip(images, questions, answers, strict=True)
    predictions = [dict(image_id=image_id(i), question=q, caption=a) for i, q, a in entries]
    return _write(output, {"exact answers": exact_answers(answers, references.values())}, predictions)


def read_split(args):
    """DataFrame of the usable rows of the split. Raises ValueError when there is none."""
    source = args.captions_file or sources.find_captions(args.data, args.image_dir)
    unescape = train_config.unescape_captions
    df = sources.load(args.data, args.captions_file, args.image_dir, [args.split], unescape)
    df = sources.drop_unusable(df, source)
    rows = df[df["split"] == args.split]
    if rows.empty:
        counts = ", ".join(f"{split} {n:,}" for split, n in df.groupby("split")["image"].nunique().items())
        raise ValueError(f"{args.data}: the split {args.split} is empty; images of the other splits: {counts}")
    if args.max_images:
        rows = rows[rows["image"].isin(rows["image"].unique()[: args.max_images])]
    return rows


def image_id(path):
    """The id of an image in a results file: COCO's number if the file's name contains one (000000000139.jpg and
    COCO_val2014_000000000139.jpg -> 139), else the name."""
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    return int(number[1]) if number else path.name


def read_predictions(path, images):
    """A results file -> {image: caption}; images without a caption are left out.

    Raises ValueError that names the file and the entry for a wrong format, an unknown image or a repeated one.
    """
    known = {image_id(image): image for image in images} | {image.name: image for image in images}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries = [(entry["image_id"], entry["caption"]) for entry in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected [{{"image_id": ..., "caption": ...}}, ...] ({error!r})') from error
    candidates = {}
    for number, (name, caption) in enumerate(entries):
        if not isinstance(name, (str, int)) or not isinstance(caption, str):
            raise ValueError(
                f"{path}, entry {number}: image_id {name!r} and caption {caption!r} must be a name and a text"
            )
        if name not in known:
            raise ValueError(f"{path}, entry {number}: the image {name!r} is not in this split")
        if known[name] in candidates:
            raise ValueError(f"{path}, entry {number}: the image {name!r} comes twice")
        candidates[known[name]] = caption
    return candidates


def _write(folder, scores, predictions):
    """Print the scores, write scores and predictions to `folder` -> scores."""
    print(as_table(scores))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("scores.json", scores), ("predictions.json", predictions)):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / name, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
    return scores


def write_page(path, title, scores, candidates, references):
    """Write a page with the scores and the photos whose captions are best and worst by CIDEr."""
    each = cider_of_each(candidates, references)
    order = sorted(candidates, key=lambda image: -each[image])

    def photos(chosen):
        return [(i, candidates[i], references[i], f"CIDEr {each[i]:.3f}, {i.name}") for i in chosen]

    best, worst = order[:SHOWN], order[SHOWN:][::-1][:SHOWN]
    sections = {"Best by CIDEr": photos(best), "Worst by CIDEr": photos(worst)}
    html_pages.write_evaluation_page(path, title, table_rows(scores), {k: v for k, v in sections.items() if v})


if __name__ == "__main__":
    main()
