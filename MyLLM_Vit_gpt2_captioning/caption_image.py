"""Caption photos with a trained captioner.

    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg                            the model in captioner/
    python MyLLM_Vit_gpt2_captioning/caption_image.py examples/shapes/scene_*.png --checkpoint examples/shapes
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --beam 4 --num 3           the three best of 4 beams
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --sample --top_p 0.9 --num 5
    python MyLLM_Vit_gpt2_captioning/caption_image.py *.jpg --grid captions.png            also draw them
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --attention attention.png  the words' attention maps
    python MyLLM_Vit_gpt2_captioning/caption_image.py holiday/                             to holiday/captions.csv
    python MyLLM_Vit_gpt2_captioning/caption_image.py holiday/ --sidecars                  and to .txt files beside them
    python MyLLM_Vit_gpt2_captioning/caption_image.py holiday/ --min_confidence 0.8        and what people must look at
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --words words.html         each word explained
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --json                     for other programs

Captions are greedy unless options of beam search or sampling are given. The captions of a folder are written to its
captions.csv batch by batch; after an interruption the same command resumes. The table says what wrote each line: those
of other weights or options are counted, and captioned anew with --redo. Photos that cannot be read are reported and
left out, and the exit status is then 1.
"""

import itertools
import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from captioning.command_line.arguments import ToolParser, integer, real
from captioning.command_line.caption_table import FILE, CaptionTable, made_with
from captioning.command_line.decoding_options import add_decoding_arguments, decoding_options
from captioning.command_line.overrides import with_underscores
from captioning.command_line.photo_arguments import find_photos
from captioning.command_line.sidecars import EXISTING, XMP, Sidecars
from captioning.common.locks import LOCK_FILE, only_writer
from captioning.common.precision import mixed_precision
from captioning.common.printable import printable
from captioning.common.progress import progress_bar
from captioning.common.stopping import Stopped, listening, stop_if_asked
from captioning.decoding import attention_maps, confidence, familiarity
from captioning.decoding.search import Options, generate_ids, log_probabilities, trim
from captioning.images.preprocessing import preprocess
from captioning.model import checkpoint, hugging_face
from captioning.model.tokenizer import read_prompt
from captioning.pages import html_pages, plots
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, load_captioner, stored_config, train_config

THUMBNAIL_SIDE = 640  # pixels of the longer side of a photo that is drawn
HOW_TO_GO_ON = "captions already in a table stay there, and the same command resumes"


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, or with --allow_urls a URL")
    parser.add_argument(
        "--checkpoint",
        default=OUTPUT_DIR,
        help='folder or hub id "user/repo", ours or a Hugging Face ViT + GPT-2 (default: captioner)',
    )
    add_decoding_arguments(parser)
    parser.add_argument(
        "--max_tokens", type=integer(0), default=50, metavar="N", help="longest caption, in tokens (default: 50)"
    )
    parser.add_argument("--num", type=integer(1), default=1, metavar="N", help="captions an image (default: 1)")
    parser.add_argument("--prompt", default="", help="text that the caption begins with")
    parser.add_argument("--batch_size", type=integer(1), default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also draw the photos with their captions")
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="PNG",
        help="also draw the attention map of each word of an image's first caption; several images go to numbered "
        "files, or give a folder",
    )
    parser.add_argument(
        "--block", type=integer(0), metavar="N", help="attention of this decoder block, from 0 (default: mean of all)"
    )
    parser.add_argument(
        "--head", type=integer(0), metavar="N", help="attention of this head, from 0 (default: mean of all)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="write all captions to this file (default: FOLDER/captions.csv)"
    )
    parser.add_argument(
        "--redo", action="store_true", help="caption anew what other weights or options captioned, as the table says"
    )
    add_sidecar_arguments(parser)
    parser.add_argument(
        "--min_confidence",
        type=real(above=0, at_most=1),
        metavar="X",
        help="mark captions with less confidence; those of a table also go to a list beside it, ..._to_check.csv",
    )
    parser.add_argument(
        "--words",
        type=Path,
        metavar="HTML",
        help="also write a page that explains the words of each image's first caption: seen or guessed, attention, "
        "alternatives",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a line: image, captions, log_probabilities, confidences, words with theirs, familiarity",
    )
    parser.add_argument("--allow_urls", action="store_true", help="fetch images that are URLs")
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))
    try:
        with ExitStack() as locks:
            caption_all(args, locks)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except Stopped as reason:
        sys.exit(str(reason))
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {HOW_TO_GO_ON}")


def add_sidecar_arguments(parser):
    """Add the options about files beside the photos; `read_sidecars` reads them."""
    parser.add_argument(
        "--sidecars", action="store_true", help="also write the captions of photo.jpg to photo.txt, one a line"
    )
    parser.add_argument(
        "--caption_extension", metavar="EXT", help="of sidecars: another ending than .txt, such as .caption"
    )
    parser.add_argument("--write_xmp", action="store_true", help="also write the first caption to photo.xmp")
    parser.add_argument("--prepend", metavar="TEXT", help="of sidecars: text in front of each caption")
    parser.add_argument("--append", metavar="TEXT", help="of sidecars: text behind each caption")
    parser.add_argument(
        "--existing",
        choices=EXISTING,
        help="what to do with a sidecar that was not written here: leave it alone, replace it, or add the captions "
        "behind its lines or in front of them (default: skip)",
    )


def caption_all(args, locks):
    """Caption images as the parsed command line says; `locks`, an ExitStack, gets the locks of the tables.

    Raises OSError or ValueError when it cannot go on, and in the end when photos were left out; Stopped behind a batch,
    as in `stop_if_asked`.
    """
    decoding = decoding_options(args)
    if decoding["deterministic"] and args.num > decoding["num_beams"]:
        greedy = decoding["num_beams"] == 1
        problem = "greedy search has one caption an image" if greedy else f"more captions than --beam {args.beam}"
        raise ValueError(f"--num {args.num}: {problem}; give --beam {args.num} or more, or --sample")
    options = Options(max_tokens=args.max_tokens, num_return_sequences=args.num, **decoding)
    if not (args.attention or args.words) and (args.block is not None or args.head is not None):
        raise ValueError("--block and --head choose what --attention draws: give it a file")
    all_photos = find_photos(args.images, args.allow_urls)
    check_picture_paths(args, all_photos)
    folder, _ = stored_config(args.checkpoint)
    known = confidence.Confidence.load(folder)
    if known is None and (args.min_confidence or args.words):
        raise ValueError(f"{args.checkpoint}: the captioner is not calibrated and has no confidence; calibrate it: "
                         f"{confidence.HOW_TO_CALIBRATE}")  # fmt: skip
    sidecars = read_sidecars(args, all_photos)
    tables = read_tables(args, all_photos, locks, options, with_confidence=known is not None)
    report = print_to_stderr if args.json else print
    if known is None and (args.json or tables):
        print_to_stderr(f"{args.checkpoint} is not calibrated: its captions come without confidence")
    photos = [photo for photo in all_photos if _name_in_table(args, photo) not in tables.get(_table(args, photo), ())]
    if len(photos) < len(all_photos):
        others = sum(len(table.others & table.done) for table in tables.values())
        by_others = f", {others} of them with other weights or options (--redo captions those anew)" if others else ""
        report(
            f"{len(all_photos) - len(photos)} of {len(all_photos)} images are captioned already in "
            f"{', '.join(map(str, tables))}{by_others}; move it away to caption all of them anew"
        )
    if sidecars:
        for table in tables.values():
            table.start()
        waiting = set(photos)
        write_sidecars(args, tables, sidecars, [photo for photo in all_photos if photo not in waiting])
        left_alone = {
            photo
            for photo in photos
            if not (_lines(args, tables, photo) or any(one.is_wanted(photo.name) for one in sidecars))
        }
        photos = [photo for photo in photos if photo not in left_alone]
        if left_alone:
            report(f"{len(left_alone)} images have captions beside them already and are left alone (--existing skip)")
    if not photos:
        for table in tables.values():
            table.finish()
        report_sidecars(sidecars, report)
        for table in tables.values() if args.min_confidence else ():
            report_list_to_check(table, args.min_confidence, report)
        return
    model, tokenizer = load_captioner(folder)
    attention_maps.check_choice(model, args.block, args.head)
    for table in tables.values():
        table.start()
    outputs = Outputs(args, tables, photos, sidecars)

    asked = bool(args.json or tables or args.min_confidence or args.words)
    captioner = Captioner(model.to(train_config.device), tokenizer, options, args, known if asked else None)
    bar = progress_bar(len(photos), "captions") if any(photo.folder for photo in photos) else None
    errors = []
    with listening(HOW_TO_GO_ON):
        for start in range(0, len(photos), args.batch_size):
            stop_if_asked()
            batch = photos[start : start + args.batch_size]
            loaded, batch_errors = captioner.load(batch)
            errors += batch_errors
            for message in batch_errors:
                if len(photos) > 1:
                    print_to_stderr(f"error: {message}")
            if loaded:
                outputs.write(captioner, loaded, list(captioner.caption(loaded)))
            if bar:
                bar.update(len(batch))
    if bar:
        bar.close()
    outputs.finish(report)
    if errors:
        raise ValueError(errors[0] if len(photos) == 1 else f"{len(errors)} of {len(photos)} images were left out")


class Outputs:
    """Everything that a command writes: lines on the terminal, tables, attention maps and a grid of photos."""

    def __init__(self, args, tables, photos, sidecars=()):
        self.args, self.tables, self.sidecars = args, tables, sidecars
        self.attention_paths = name_pictures(args.attention, photos) if args.attention else {}
        self.written_maps = []  # paths
        self.grid = []  # (photo, caption) of each image
        self.explained = []  # what `html_pages.write_words_page` shows of each image

    def write(self, captioner, loaded, results):
        """Write the `results` of `Captioner.caption` for the photos of a batch, `loaded` by `Captioner.load`."""
        args = self.args
        if args.attention:  # before the tables, which say that a photo is done
            for photo, _, _, ids, _ in results:
                pixels, thumbnail = loaded[photo]
                words, maps = attention_maps.word_maps(
                    captioner.model, captioner.tokenizer, pixels, ids, args.block, args.head
                )
                attention_maps.draw_attention(thumbnail, words, maps, self.attention_paths[photo])
                self.written_maps.append(self.attention_paths[photo])
        for table, rows in itertools.groupby(results, key=lambda result: _table(args, result[0])):
            if table:
                lines = [
                    (_name_in_table(args, photo), captions, [one.caption for one in judged])
                    for photo, captions, _, _, judged in rows
                ]
                self.tables[table].add(lines)
        write_sidecars(args, self.tables, self.sidecars, [photo for photo, *_ in results])  # behind the tables
        for photo, captions, log_probs, ids, judged in results:
            if args.json:
                line = {"image": photo.name, "captions": captions, "log_probabilities": log_probs}
                print(json.dumps(line | self._confidences(judged)), flush=True)
            elif not photo.folder:
                for n, caption in enumerate(captions):
                    print(f"{printable(photo.name)}: {printable(caption)}{self._mark(judged, n)}")
            if args.grid:
                self.grid.append((loaded[photo][1], captions[0]))
            if args.words:
                self.explained.append(captioner.explain(*loaded[photo], captions[0], ids, judged[0]))

    def _confidences(self, judged):
        """The entries of a JSON line; null for a captioner that is not calibrated."""
        if not judged:
            return {"confidences": None, "words": None, "familiarity": None}
        words = [
            [[word, round(sure, 4)] for word, sure in zip(one.evidence.words, one.words, strict=True)] for one in judged
        ]
        entries = {"confidences": [round(one.caption, 4) for one in judged], "words": words}
        entries["familiarity"] = None if judged[0].familiarity is None else round(judged[0].familiarity, 4)
        if self.args.min_confidence:
            entries["to_check"] = [one.caption < self.args.min_confidence for one in judged]
        return entries

    def _mark(self, judged, n):
        """What is printed behind caption `n` of an image that people must look at."""
        if not self.args.min_confidence or judged[n].caption >= self.args.min_confidence:
            return ""
        strange = familiarity.is_strange(judged[n].familiarity)
        reason = ", as the photo is unlike those of training" if strange else ""
        return f"  (to check: confidence {judged[n].caption:.2f}{reason})"

    def finish(self, report):
        """Draw the grid, and report which files were written."""
        for path, table in self.tables.items():
            table.finish()
            report(f"{len(table.done)} images with captions are in {path}")
            if self.args.min_confidence:
                report_list_to_check(table, self.args.min_confidence, report)
        report_sidecars(self.sidecars, report)
        if self.explained:
            self.args.words.parent.mkdir(parents=True, exist_ok=True)
            html_pages.write_words_page(self.args.words, "Captions, word by word", self.explained)
            report(f"the words are explained in {self.args.words}")
        if self.written_maps:
            more = f" and {len(self.written_maps) - 1} more" if len(self.written_maps) > 1 else ""
            report(f"attention maps are drawn to {self.written_maps[0]}{more}")
        if self.grid:
            self.args.grid.parent.mkdir(parents=True, exist_ok=True)
            thumbnails, captions = zip(*self.grid, strict=True)
            plots.plot_captions(thumbnails, captions, [""] * len(thumbnails), self.args.grid)
            report(f"drawn to {self.args.grid}")


def read_sidecars(args, photos):
    """-> list of `Sidecars`, empty where none are asked for. Raises ValueError for photos that cannot have any."""
    given = {key: getattr(args, key) for key in ("existing", "prepend", "append") if getattr(args, key) is not None}
    endings = [args.caption_extension or ".txt"] * args.sidecars + [XMP] * args.write_xmp
    if not endings and (given or args.caption_extension):
        raise ValueError("--caption_extension, --prepend, --append and --existing are for --sidecars or --write_xmp")
    for photo in photos if endings else ():
        if "://" in photo.name or _table(args, photo) is None:
            raise ValueError(f"{photo.name}: --sidecars and --write_xmp are for folders, and for files with --out")
    sidecars = [Sidecars(ending, **given) for ending in endings]
    for one in sidecars:
        one.check([photo.name for photo in photos])
    return sidecars


def write_sidecars(args, tables, sidecars, photos):
    """Write the sidecars of photos whose captions are in the tables."""
    for one in sidecars:
        for photo in photos:
            one.write(photo.name, _lines(args, tables, photo))


def report_sidecars(sidecars, report):
    for one in sidecars:
        report(f"{one.written} {one.ending} files were written beside the photos")
        if one.foreign:
            report(
                f"{one.foreign} {one.ending} files hold something else than the table's captions and are left alone; "
                "--existing overwrite, append or prepend changes them"
            )


def report_list_to_check(table, min_confidence, report):
    """Write the list of a table's captions that people must look at, and say where it is."""
    path, count = table.write_list_to_check(min_confidence)
    report(f"{count} of them, with a confidence below {min_confidence:g}, are to be checked: {path}")


def print_to_stderr(text):
    tqdm.write(text, file=sys.stderr)  # above the progress bar


def _table(args, photo):
    """Path of the table for a photo's captions; None for a photo that was not given by its folder, without --out."""
    return args.out or (photo.folder / FILE if photo.folder else None)


def _lines(args, tables, photo):
    """The captions in the lines of a photo in its table: a list for each line, the newest last."""
    return tables[_table(args, photo)].captions(_name_in_table(args, photo))


def _name_in_table(args, photo):
    """A photo's name in its table: in its folder's own table the path relative to the folder."""
    return photo.name if args.out else photo.name_in_folder


def check_picture_paths(args, photos):
    """Raise ValueError when --grid or --attention would write into a folder whose photos are captioned."""
    for path in filter(None, (args.grid, args.attention)):
        for folder in {photo.folder for photo in photos if photo.folder}:
            if path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} lies in {folder}, where it would be captioned next time: name another place")


def read_tables(args, photos, locks, options, with_confidence):
    """-> {path: `CaptionTable`} of all tables for the captions of these photos, with the lines they have already; their
    locks are held by `locks`, so that no image is captioned twice. Raises BlockingIOError for one that another command
    is writing."""
    paths = dict.fromkeys(path for path in (_table(args, photo) for photo in photos) if path)
    for path in paths:
        with suppress(OSError):  # said when the table is written
            path.parent.mkdir(parents=True, exist_ok=True)
        remedy = "wait for it, or name another file with --out"
        locks.enter_context(only_writer(path.with_name(f".{path.name}{LOCK_FILE}"), remedy))
    if not paths:
        return {}
    folder, _ = stored_config(args.checkpoint)
    model = Path(args.checkpoint).resolve() if Path(args.checkpoint).is_dir() else args.checkpoint
    made = made_with(hugging_face.weights_files(folder) or [checkpoint.weights_file(folder)], deciding(options, args))
    return {path: CaptionTable(path, args.num, model, made, with_confidence, args.redo) for path in paths}


def deciding(options, args):
    """The options of a command that decide the words of a caption, without those that have their default values."""
    changed = {
        field.name: value for field in fields(options) if (value := getattr(options, field.name)) != field.default
    }
    changed = {key: value for key, value in changed.items() if key not in ("deterministic", "num_return_sequences")}
    if options.deterministic:
        changed.pop("seed", None)
    if args.precision != "auto":
        changed["precision"] = args.precision
    return changed | ({"prompt": args.prompt} if args.prompt else {})


def name_pictures(path, photos):
    """-> {photo: path of the picture with its attention maps}; makes the folder for it.

    `path` is a PNG, numbered when there are two or more photos, or a folder, in which each picture has the name of its
    photo. Raises ValueError for another image format.
    """
    if path.suffix.lower() in (".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".gif"):
        raise ValueError(f"--attention {path}: drawn as PNG; give a name that ends with .png, or a folder")
    is_file = path.suffix.lower() == ".png" and not path.is_dir()
    (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
    if is_file and len(photos) == 1:
        return {photos[0]: path}
    if is_file:
        return {photo: path.with_stem(f"{path.stem}_{number}") for number, photo in enumerate(photos, 1)}
    pictures = {}
    for photo in photos:
        stem = Path(photo.name_in_folder).with_suffix("") if photo.folder else Path(photo.name.rstrip("/")).stem
        name, number = str(stem).replace("/", "_").replace("\\", "_"), 1
        while (picture := path / (f"{name}_{number}.png" if number > 1 else f"{name}.png")) in pictures.values():
            number += 1
        pictures[photo] = picture
    return pictures


class Captioner:
    """The model, tokenizer and options of a command; `known`: the captioner's `Confidence` where it is asked for."""

    def __init__(self, model, tokenizer, options, args, known=None):
        self.known = known
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.device = next(model.parameters()).device
        generator = torch.Generator(self.device).manual_seed(args.seed)  # one generator for all batches
        self.options = replace(options, seed=generator)
        self.prompt = read_prompt(tokenizer, args.prompt, model.config)
        if self.prompt.unknown:
            print_to_stderr(f"warning: {self.prompt.warning()}")
        self.autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)

    def load(self, photos):
        """-> ({photo: (pixels (3, H, W), thumbnail to draw or None)}, an error message for each unreadable photo)."""
        loaded, errors = {}, []
        for photo in photos:
            try:
                image, thumbnail = photo.load(self.model.preprocessing.get("grey16", "full")), None
                if self.args.grid or self.args.attention or self.args.words:
                    thumbnail = image.copy()
                    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                loaded[photo] = preprocess(image, **self.model.preprocessing), thumbnail
            except (OSError, ValueError) as error:
                errors.append(str(error))
        return loaded, errors

    @torch.inference_mode()
    def caption(self, loaded):
        """The photos of `load` -> yields (photo, captions, log-probabilities, ids of the first caption, 1-D, the
        `Judged` of its captions) for each; the log-probabilities are None without --json, and there is no `Judged`
        where the confidence is not asked for."""
        pixels = torch.stack([pixels for pixels, _ in loaded.values()]).to(self.device)  # (B, 3, H, W)
        sequences = torch.tensor([self.prompt.ids] * len(loaded), device=self.device)  # (B, T)
        prompt_length, log_probs, judged = len(self.prompt.ids), None, []
        with self.autocast():
            levels = self.model.levels(pixels)  # encoded once for captions and log-probabilities
            options = vars(self.options) | {"tokenizer": self.tokenizer}
            ids = generate_ids(self.model, levels, sequences, **options)  # (B * num, T + new)
            if self.known:
                judged = self.known.judge(self.model, self.tokenizer, levels, ids, prompt_length, pixels)
                log_probs = [one.evidence.log_probability for one in judged]
            elif self.args.json:
                log_probs = log_probabilities(self.model, levels, ids, prompt_length).tolist()
        num = len(ids) // len(loaded)
        for i, (photo, rows) in enumerate(zip(loaded, ids.cpu().view(len(loaded), -1, ids.size(1)), strict=True)):
            captions = [self.prompt.caption(self.tokenizer, row) for row in rows.tolist()]
            first = trim(rows[0], prompt_length, self.model.config.eos_token_id)
            own = slice(i * num, (i + 1) * num)
            yield photo, captions, log_probs and [round(value, 4) for value in log_probs[own]], first, judged[own]

    @torch.inference_mode()
    def explain(self, pixels, thumbnail, caption, ids, judged):
        """A photo of `load` and its caption -> a dict as `html_pages.write_words_page` takes it."""
        evidence, photo = judged.evidence, pixels[None].to(self.device)  # (1, 3, H, W)
        with self.autocast():
            states = self.model.encoder_states(photo)
            both = states, confidence.no_photo_states(self.known.no_photo, states)
            first_tokens, ids = [positions[0] for positions in evidence.positions], ids.to(self.device)
            of_both = [confidence.alternatives(self.model, self.tokenizer, s, ids, first_tokens) for s in both]
            words, maps = attention_maps.word_maps(
                self.model, self.tokenizer, pixels, ids.tolist(), self.args.block, self.args.head
            )
        maps = maps[len(words) - len(evidence.words) :]  # without those of the prompt
        parts = zip(evidence.words, judged.words, evidence.seen(), maps, *of_both, strict=True)
        words = [
            dict(word=w, confidence=c, seen=bool(s), map=attention_maps.overlay(thumbnail, m), with_photo=a, without=b)
            for w, c, s, m, a, b in parts
        ]
        return dict(photo=thumbnail, caption=caption, confidence=judged.caption, words=words)


if __name__ == "__main__":
    main()
