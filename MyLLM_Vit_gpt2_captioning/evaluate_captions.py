"""Caption every image of a split and score the captions with the usual metrics: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

    python MyLLM_Vit_gpt2_captioning/evaluate_captions.py captioner --data data/flickr8k --split test --beam 4
    python MyLLM_Vit_gpt2_captioning/evaluate_captions.py --predictions results.json --data data/coco2017 --split val
    python MyLLM_Vit_gpt2_captioning/evaluate_captions.py --compare captioner other.json --data data/flickr8k

Prints a table and writes to --output:
    scores.json        the table
    predictions.json   [{"image_id": ..., "caption": ...}], COCO's results format, which other tools score too
    page.html          photos with their captions, best and worst first
    confidence.png     of a calibrated captioner: how good its confidence is; the table has measures of it
--predictions scores the captions of another model, in a file of that format. SPICE needs Java. --calibrate
scores nothing: it teaches a captioner its confidence on this split, as training does on val when it ends.
--diagnose looks for what is wrong with the captioner and the dataset instead, and prints what it measured.

--compare scores two or more checkpoints or files of that format on the same images, the others against the first:
differences with 95% intervals and p-values by a paired bootstrap. It writes comparison.json and comparison.html, with
the photos whose captions changed most.
"""

import json
import re
import sys
from pathlib import Path, PurePosixPath

import torch

from captioning.command_line.arguments import ToolParser, integer
from captioning.command_line.decoding_options import add_decoding_arguments, decoding_options
from captioning.common.files import CONFIG_FILE, write_atomically
from captioning.common.form import check, misfit
from captioning.common.precision import mixed_precision
from captioning.data import batching, shapes, sources
from captioning.data.annotation_folders import read_image_ids
from captioning.data.conventions import ALL, SPLITS
from captioning.data.shards import reading
from captioning.data.token_cache import TokenCache, fill_caches
from captioning.decoding.confidence import Confidence, JudgedCaptions
from captioning.pages import html_pages
from captioning.scoring import calibration
from captioning.scoring.comparison import compare_systems, comparison_rows, most_changed
from captioning.scoring.evaluation import as_table, cider_of_each, exact_answers, predict, score, table_rows
from captioning.scoring.hallucination import OBJECT_NAMES, PhotoObjects
from captioning.scoring.tokenization import TOKENS
from captioning.training import diagnosis, measurements
from MyLLM_Vit_gpt2_captioning import (
    DATA_DIR,
    OUTPUT_DIR,
    Dataset,
    build_transforms,
    collate_fn,
    load_captioner,
    stored_config,
    train_config,
)

DIAGRAM = "confidence.png"
SHOWN = 40  # best and worst photos on the page


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default=OUTPUT_DIR, help="folder or hub id (default: captioner)")
    parser.add_argument("--data", type=Path, default=DATA_DIR, metavar="FOLDER", help="dataset (default: data)")
    parser.add_argument("--captions_file", type=Path, help="the annotation file, if it is not found in the folder")
    parser.add_argument("--image_dir", type=Path, help="the folder with the photos, if they are elsewhere")
    parser.add_argument("--split", choices=(*SPLITS, ALL), default="test", help="(default: test)")
    parser.add_argument("--max_images", type=integer(1), metavar="N", help="only the first N images of the split")
    parser.add_argument("--batch_size", type=integer(1), default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these captions instead of a model's")
    parser.add_argument(
        "--compare", nargs="+", metavar="SYSTEM", help="compare checkpoints or prediction files (.json), two or more"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: CHECKPOINT/evaluation_SPLIT)")
    parser.add_argument("--cache_dir", type=Path, metavar="FOLDER", help="use the token cache in this folder")
    parser.add_argument("--calibrate", action="store_true", help="teach the captioner in this folder its confidence")
    parser.add_argument("--shifted", action="store_true", help="with --calibrate: from shifted photos, too; slower")
    parser.add_argument("--diagnose", action="store_true", help="look for faults of captioner and dataset instead")
    parser.add_argument("--instances", type=Path, metavar="FILE", help="COCO's objects of the photos, if not found")
    parser.add_argument(
        "--object_names", type=Path, default=OBJECT_NAMES, metavar="FILE", help="names of objects, other than our table"
    )
    parser.add_argument(
        "--score_tokens",
        choices=TOKENS,
        default=train_config.score_tokens,
        help="what scores count; characters for languages without spaces between words (default: %(default)s)",
    )
    parser.add_argument("--java_meteor", action="store_true", help="METEOR from its Java program, to compare")
    add_decoding_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.shifted and not args.calibrate:
            raise ValueError("--shifted goes with --calibrate: how a captioner's confidence is made is stored with it")
        if args.diagnose:
            return diagnose(args)
        if args.calibrate:
            return calibrate_captioner(args)
        return compare(args) if args.compare else evaluate_split(args)
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
    images, finished, judged = list(references), None, {}
    ids = image_ids(args, images)
    if args.predictions and "prompt" in rows:
        raise ValueError(f"{args.data} asks questions; --predictions scores captions")
    objects = PhotoObjects(references, args.data, args.object_names, args.instances)
    if args.predictions:
        candidates = read_predictions(args.predictions, ids)
    else:
        caption = load_predictor(args, images)
        if "prompt" in rows:
            return score_answers(rows, caption, options, args.data, output, ids)
        captions, finished, judged = caption(images, **options)
        candidates = dict(zip(images, captions, strict=True))
    java_meteor, by = args.java_meteor, args.score_tokens
    scores = score(candidates, references, finished, java_meteor=java_meteor, objects=objects, by=by)
    if judged:
        scores |= score_confidence(
            images, captions, list(references.values()), judged, args.data, output, by=args.score_tokens
        )
    predictions = [dict(image_id=ids[image], caption=caption) for image, caption in candidates.items()]
    _write(output, scores, predictions, judged)
    title = f"{args.predictions or args.checkpoint}: {args.split}"
    write_page(output / "page.html", title, scores, candidates, references, judged, objects.absent(candidates), by)
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
    tfms.grey16 = photo.get("grey16", "full")
    training, split = (Dataset(part, tfms, tokenizer, 1, config.seq_len) for part in (df[df["split"] == "train"], rows))
    first = list({image: row for row, image in reversed(list(enumerate(split.images)))}.values())[: measurements.PHOTOS]
    batch = collate_fn(split.__getitems__(first), tokenizer)
    images = list(split.captions_of)[:100]
    captions, *_ = load_predictor(args, images)(images, **decoding_options(args))
    autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)
    written = captions, [split.captions_of[image] for image in images]
    batch = batching.to_device(batch, train_config.device)
    found = diagnosis.of_captioner(model, training, split, batch, written, autocast, train_config)
    print(found.as_table())
    return found.findings


def compare(args):
    """Score and compare the systems of --compare, print tables, write comparison.json and comparison.html
    -> [{"first", "other", "scores"}, ...]. Raises OSError or ValueError that names what cannot be compared."""
    if len(args.compare) < 2 or len(set(args.compare)) < len(args.compare) or args.predictions:
        raise ValueError("--compare needs two or more different systems, and no --predictions")
    options, rows = decoding_options(args), read_split(args)
    if "prompt" in rows:
        raise ValueError(f"{args.data} asks questions; --compare compares captions")
    references = rows.groupby("image", sort=False)["caption"].agg(list).to_dict()
    objects = PhotoObjects(references, args.data, args.object_names, args.instances)
    images, systems = list(references), {}
    for name in args.compare:
        if name.endswith(".json"):
            systems[name] = read_predictions(Path(name), image_ids(args, images))
        else:
            captions, *_ = load_predictor(args, images, name)(images, **options)
            systems[name] = dict(zip(images, captions, strict=True))
    results = compare_systems(systems, references, args.score_tokens, objects.parts)
    changed = [
        (image, [(name, caption, f"{cider:.2f}") for name, caption, cider in captions], references[image])
        for image, captions in most_changed(systems, references, SHOWN, args.score_tokens)
    ]
    tables = [comparison_rows(*result) for result in results]
    print("\n\n".join(map(html_pages.text_table, tables)))
    count = len(next(iter(systems.values())))
    parts = [f"<h1>Comparison: {args.split}, {count:,} images</h1>", *map(html_pages.table, tables)]
    parts += ["<h2>Changed most by CIDEr</h2>", html_pages.side_by_side(changed)]
    output = args.output or Path(f"comparison_{args.split}")
    output.mkdir(parents=True, exist_ok=True)
    written = [dict(first=first, other=other, scores=scores) for first, other, scores in results]
    _write_json(output / "comparison.json", written)
    html_pages.write_page(output / "comparison.html", "Comparison", parts)
    print(f"comparison.json and comparison.html: {output}")
    return written


def load_predictor(args, images, checkpoint=None):
    """Load the captioner -> a function (images, prompts="", **options) -> (captions, for each whether it ended with
    EOS, {number of an image: [its `Judged`]}, empty for a captioner that is not calibrated).

    With --cache_dir the encoder's tokens of `images` are computed once and then read from the token cache.
    """
    model, tokenizer, autocast, batches = load_model(args, images, checkpoint)
    known = Confidence.load(stored_config(checkpoint or args.checkpoint)[0])

    def caption(images, prompts="", **options):
        judged = JudgedCaptions(known, model, tokenizer) if known else None
        with autocast():
            return *predict(model, tokenizer, images, prompts, observe=judged, **batches, **options), judged or {}

    return caption


def load_model(args, images, checkpoint=None):
    """-> (model, tokenizer, the context to compute in, how batches of `images` are made: arguments of `predict`)."""
    model, tokenizer = load_captioner(checkpoint or args.checkpoint)
    model.to(train_config.device)
    autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)
    batches = dict(batch_size=args.batch_size)
    if args.cache_dir:
        cache = TokenCache(args.cache_dir, model, precision=args.precision)
        fill_caches(model, [(cache, images, None)])
        batches["load_batch"] = cache.batch
    return model, tokenizer, autocast, batches


def calibrate_captioner(args):
    """Calibrate the captioner in a folder on the photos of the split, in its config.json -> its `Confidence`.

    Raises ValueError for a captioner that is no folder, and where too little can be learnt from the split.
    """
    if args.predictions or not Path(args.checkpoint).is_dir():
        raise ValueError("--calibrate changes a captioner: give the folder of one, and no --predictions")
    rows = read_split(args)
    if "prompt" not in rows:
        rows = rows.assign(prompt="")
    references = rows.groupby(["image", "prompt"], sort=False)["caption"].agg(list).to_dict()
    images, prompts = map(list, zip(*references, strict=True))
    training = training_photos(args)
    model, tokenizer, autocast, batches = load_model(args, images)
    truth = list(references.values()), shapes.true_scenes(args.data), prompts
    with autocast():
        options = dict(shifted=args.shifted, by=args.score_tokens, training=training)
        known = calibration.calibrate(model, tokenizer, images, *truth, **batches, **options)
    known.save(args.checkpoint)
    print(f"{calibration.describe(known)}: stored in {Path(args.checkpoint) / CONFIG_FILE}")
    return known


def training_photos(args):
    """Photos of the dataset's training split: none where it has no such split or is calibrated on it, nor of tar
    shards, which would all be read for them."""
    if args.split in ("train", ALL) or reading.has_shards(args.data):
        return []
    try:
        rows = sources.load_split(args.data, "train", args.captions_file, args.image_dir)
    except ValueError:  # no such split; the split that is calibrated on was read before
        return []
    return calibration.sample_of_training(list(rows["image"].unique()))


def score_answers(rows, caption, options, data, output, ids):
    """Answer the questions in `rows`, write scores and predictions to `output` -> {"exact answers": share, ...}. `ids`
    as `image_ids` gives them."""
    references = rows.groupby(["image", "prompt"], sort=False)["caption"].agg(list).to_dict()
    images, questions = map(list, zip(*references, strict=True))
    answers, _, judged = caption(images, questions, **options)
    entries = zip(images, questions, answers, strict=True)
    predictions = [dict(image_id=ids[i], question=q, caption=a) for i, q, a in entries]
    scores = exact_answers(answers, references.values())
    if judged:
        scores |= score_confidence(images, answers, list(references.values()), judged, data, output, are_answers=True)
    return _write(output, scores, predictions, judged)


def score_confidence(images, captions, references, judged, data, output, are_answers=False, by="words"):
    """How good the confidence of captions is -> scores; draws the diagrams to `output`. `judged`: {number of an image:
    [its `Judged`]}; other arguments as in `calibration.judge`, with the scenes in `data`."""
    of_each = [judged[i][0] for i in range(len(images))]
    words = [one.evidence.words for one in of_each]
    truth = calibration.judge(images, captions, words, references, shapes.true_scenes(data), are_answers, by)
    scores = calibration.measure_captions(of_each, truth, output / DIAGRAM)
    if not are_answers:
        cider = cider_of_each(dict(enumerate(captions)), dict(enumerate(references)), by)
        surest = sorted(cider, key=lambda i: -of_each[i].caption)[: -(-len(cider) // 2)]
        scores["CIDEr of the surer half"] = sum(cider[i] for i in surest) / len(surest)
    return scores


def read_split(args):
    """DataFrame of the usable rows of the split. Raises ValueError when there is none."""
    cleaning = dict(unescape=train_config.unescape_captions)
    if not (args.predictions or args.compare):  # answers are compared letter for letter
        cleaning["case"] = stored_config(args.checkpoint)[1].caption_case
    rows = sources.load_split(args.data, args.split, args.captions_file, args.image_dir, **cleaning)
    if args.max_images:
        rows = rows[rows["image"].isin(rows["image"].unique()[: args.max_images])]
    return rows


def image_ids(args, images):
    """{path of an image: its id in a results file}: that of the annotation file, where it has ids, else `image_id`."""
    source = args.captions_file or sources.find_captions(args.data, args.image_dir)
    given = {}  # {name of the file without folders: [(its name in the annotation file, its id), ...]}
    for name, number in read_image_ids(source).items():
        given.setdefault(PurePosixPath(name).name, []).append((PurePosixPath(name), number))
    ids = {}
    for image in images:
        entries = given.get(image.name, [])
        if len(entries) > 1:  # of several with this name, that whose folders are those of the path
            entries = [(name, number) for name, number in entries if image.parts[-len(name.parts) :] == name.parts]
        ids[image] = entries[0][1] if len(entries) == 1 else image_id(image)
    return ids


def image_id(path):
    """The id of an image by its name: COCO's number if the file's name contains one (000000000139.jpg and
    COCO_val2014_000000000139.jpg -> 139), else the name."""
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    return int(number[1]) if number else path.name


class ImageFinder:
    """The images of a split, by what results files call them: the id, as a number or a text; the name, with folders of
    it, and without its ending; the number in the name. `ids` as `image_ids` gives them."""

    def __init__(self, ids):
        self.by = [{}, {}, {}, {}]  # by id, name, name without ending, number in it
        for image, number in ids.items():
            digits = re.search(r"[0-9]+$", image.stem)
            names = (str(number), image.name, image.stem, digits and _without_zeros(digits[0]))
            for table, name in zip(self.by, names, strict=True):
                table.setdefault(name, []).append(image)

    def find(self, name):
        """The images that `name`, a str or an int, may mean: one where it is clear."""
        parts = PurePosixPath(str(name).strip().replace("\\", "/")).parts
        last = parts[-1] if parts else ""
        number = _without_zeros(last) if re.fullmatch(r"[0-9]+", last) else None
        for table, wanted in zip(self.by, (str(name).strip(), last, last, number), strict=True):
            found = table.get(wanted, []) if wanted is not None else []
            if len(parts) > 1 and table is self.by[1]:  # folders have to agree where that tells images apart
                agreeing = [image for image in found if image.parts[-len(parts) :] == parts]
                found = agreeing or found
            if found:
                return found
        return []


def _without_zeros(digits):
    """ "000139" -> "139". Not by way of a number: a stranger's may have too many digits for one."""
    return digits.lstrip("0") or "0"


def read_predictions(path, ids):
    """A results file -> {image: caption}; images without a caption are left out. `ids` as `image_ids` gives them.

    Raises ValueError that names the file and the entry for a wrong format, an unknown image, one that may be two
    images, or a repeated one.
    """
    finder = ImageFinder(ids)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        check(entries, [{"image_id": object, "caption": object}])
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise ValueError(f'{path}: expected [{{"image_id": ..., "caption": ...}}, ...] ({error})') from error
    candidates = {}
    for number, entry in enumerate(entries):
        name, caption = entry["image_id"], entry["caption"]
        if misfit(entry, {"image_id": (str, int), "caption": str}):
            raise ValueError(
                f"{path}, entry {number}: image_id {repr(name)[:60]} and caption {repr(caption)[:60]} must be "
                "a name and a text"
            )
        found = finder.find(name)
        if not found:
            raise ValueError(f"{path}, entry {number}: the image {repr(name)[:100]} is not in this split")
        if len(found) > 1:
            raise ValueError(
                f"{path}, entry {number}: the image {repr(name)[:100]} may be {found[0]} or {found[1]}; give its id, "
                "or its name with the folder"
            )
        if found[0] in candidates:
            raise ValueError(f"{path}, entry {number}: the image {name!r} comes twice")
        candidates[found[0]] = caption
    return candidates


def _write(folder, scores, predictions, judged):
    """Print the scores, write scores and predictions to `folder` -> scores. `judged` as in `score_confidence`; where it
    is not empty, each prediction gets its confidence."""
    print(as_table(scores))
    folder.mkdir(parents=True, exist_ok=True)
    for i, of_image in judged.items():
        predictions[i]["confidence"] = round(of_image[0].caption, 4)
    _write_json(folder / "scores.json", scores)
    _write_json(folder / "predictions.json", predictions)
    return scores


def _write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_page(path, title, scores, candidates, references, judged, absent, by="words"):
    """Write a page with the scores, the photos whose captions are best and worst by CIDEr and those whose captions
    name what is `absent`, {image: [things]}; for a calibrated captioner with the diagrams of its confidence, and the
    captions of which it is least sure."""
    each = cider_of_each(candidates, references, by)
    order = sorted(candidates, key=lambda image: -each[image])
    sure = {image: judged[i][0].caption for i, image in enumerate(candidates)} if judged else {}

    def photos(chosen):
        shown = {i: f"confidence {sure[i]:.2f}, " if sure else "" for i in chosen}
        shown |= {i: f"not there: {', '.join(absent[i])}; {shown[i]}" for i in chosen if i in absent}
        return [(i, candidates[i], references[i], f"{shown[i]}CIDEr {each[i]:.3f}, {i.name}") for i in chosen]

    best, worst = order[:SHOWN], order[SHOWN:][::-1][:SHOWN]
    sections = {"Best by CIDEr": photos(best), "Worst by CIDEr": photos(worst)}
    sections["Name what is not there"] = photos(sorted(absent, key=each.get)[:SHOWN])
    sections["Least sure"] = photos(sorted(sure, key=sure.get)[:SHOWN])
    diagram = (path.parent / DIAGRAM).read_bytes() if judged else None
    sections = {heading: shown for heading, shown in sections.items() if shown}
    html_pages.write_evaluation_page(path, title, table_rows(scores), sections, diagram)


if __name__ == "__main__":
    main()
