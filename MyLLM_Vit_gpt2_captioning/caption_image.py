"""Caption photos with a trained captioner.

    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg                            the model in captioner/
    python MyLLM_Vit_gpt2_captioning/caption_image.py examples/shapes/scene_*.png --checkpoint examples/shapes
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --beam 4 --num 3           the three best of 4 beams
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --sample --top_p 0.9 --num 5
    python MyLLM_Vit_gpt2_captioning/caption_image.py *.jpg --grid captions.png            also draw them
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --attention attention.png  where each word looked
    python MyLLM_Vit_gpt2_captioning/caption_image.py holiday/                             to holiday/captions.csv
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --json                     for other programs

Captions are greedy unless beams or sampling are asked for. The captions of a folder are written to its captions.csv as
they are made; the same command goes on where it stopped. A photo that cannot be read is named and left out, and the
exit status is 1 at the end.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from captioning.command_line.caption_table import FILE, CaptionTable
from captioning.command_line.decoding_options import add_decoding_arguments, decoding_options
from captioning.command_line.overrides import with_underscores
from captioning.command_line.photo_arguments import find_photos
from captioning.common.precision import mixed_precision
from captioning.common.progress import progress_bar
from captioning.decoding import attention_maps
from captioning.decoding.search import Options, generate_ids, log_probabilities, trim
from captioning.images.preprocessing import preprocess
from captioning.model.tokenizer import encode_prompt
from captioning.pages import plots
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, load_captioner, train_config

SHOWN_SIDE = 640  # pixels of a photo that is kept to be drawn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, or with --allow_urls a URL")
    parser.add_argument(
        "--checkpoint",
        default=OUTPUT_DIR,
        help='folder or hub id "user/repo", ours or a Hugging Face ViT + GPT-2 (default: captioner)',
    )
    add_decoding_arguments(parser)
    parser.add_argument("--max_tokens", type=int, default=50, help="longest caption, in tokens (default: 50)")
    parser.add_argument("--num", type=int, default=1, help="captions an image (default: 1)")
    parser.add_argument("--prompt", default="", help="how the caption begins")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also draw the photos with their captions")
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="PNG",
        help="also draw where each word of an image's first caption looked; with several images to numbered files, or "
        "give a folder",
    )
    parser.add_argument("--block", type=int, help="attention of this decoder block, from 0 (default: mean of all)")
    parser.add_argument("--head", type=int, help="attention of this head, from 0 (default: mean of all)")
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="all captions to this file (default: FOLDER/captions.csv)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line: image, captions, log_probabilities")
    parser.add_argument("--allow_urls", action="store_true", help="fetch images that are URLs")
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))
    try:
        caption_all(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what is in a table of captions stays, and the same command goes on")


def caption_all(args):
    """What the parsed command line asks for. Raises OSError or ValueError where it cannot go on, and where it left out
    photos in the end."""
    options = Options(max_tokens=args.max_tokens, num_return_sequences=args.num, **decoding_options(args))
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {args.batch_size}")
    if not args.attention and (args.block is not None or args.head is not None):
        raise ValueError("--block and --head choose what --attention draws: give it a file")
    everything = find_photos(args.images, args.allow_urls)
    for path in filter(None, (args.grid, args.attention)):
        for folder in {photo.folder for photo in everything if photo.folder}:
            if path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} lies in {folder}, where it would be captioned next time: name another place")
    tables = read_tables(args, everything)
    say = print_to_stderr if args.json else print
    photos = [photo for photo in everything if _key(args, photo) not in tables.get(_table(args, photo), ())]
    if len(photos) < len(everything):
        say(f"{len(everything) - len(photos)} of {len(everything)} images are captioned already in "
            f"{', '.join(map(str, tables))}; move it away to caption them anew")  # fmt: skip
    if not photos:
        return
    model, tokenizer = load_captioner(args.checkpoint)
    attention_maps.check_choice(model, args.block, args.head)
    for table in tables.values():
        table.start()
    pictures = name_pictures(args.attention, photos) if args.attention else {}

    captioner = Captioner(model.to(train_config.device), tokenizer, options, args)
    bar = progress_bar(len(photos), "captions") if any(photo.folder for photo in photos) else None
    failed, drawn, pictured = [], [], []
    for start in range(0, len(photos), args.batch_size):
        batch = photos[start : start + args.batch_size]
        read, errors = captioner.read(batch)
        failed += errors
        for message in errors:
            if len(photos) > 1:
                print_to_stderr(f"error: {message}")
        rows = list(captioner.caption(read)) if read else []
        for photo, _, _, ids in rows if args.attention else ():  # before the table says that they are done
            pixels, shown = read[photo]
            words, maps = attention_maps.word_maps(model, tokenizer, pixels, ids, args.block, args.head)
            attention_maps.draw_attention(shown, words, maps, pictures[photo])
            pictured.append(pictures[photo])
        for table, of_table in itertools.groupby(rows, key=lambda row: _table(args, row[0])):
            if table:
                tables[table].add([(_key(args, photo), captions) for photo, captions, *_ in of_table])
        for photo, captions, likely, _ in rows:
            if args.json:
                print(json.dumps({"image": photo.name, "captions": captions, "log_probabilities": likely}), flush=True)
            elif not photo.folder:
                for caption in captions:
                    print(f"{photo.name}: {caption}")
            if args.grid:
                drawn.append((read[photo][1], captions[0]))
        if bar:
            bar.update(len(batch))
    if bar:
        bar.close()
    for path, table in tables.items():
        say(f"{len(table.done)} images with captions are in {path}")
    if pictured:
        more = f" and {len(pictured) - 1} more" if len(pictured) > 1 else ""
        say(f"where each word looked is drawn to {pictured[0]}{more}")
    if drawn:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        shown, captions = zip(*drawn, strict=True)
        plots.plot_captions(shown, captions, [""] * len(shown), args.grid)
        say(f"drawn to {args.grid}")
    if failed:
        raise ValueError(failed[0] if len(photos) == 1 else f"{len(failed)} of {len(photos)} images were left out")


def print_to_stderr(text):
    tqdm.write(text, file=sys.stderr)  # above the progress bar


def _table(args, photo):
    """The path of the table that a photo's captions go to; None for a photo by itself."""
    return args.out or (photo.folder / FILE if photo.folder else None)


def _key(args, photo):
    """What a photo is called there: in its folder's own table by its place in the folder."""
    return photo.name if args.out else photo.name_in_folder


def read_tables(args, photos):
    """-> {path: `CaptionTable`} of all tables that the photos' captions go to, with what is in them already."""
    local = Path(args.checkpoint).is_dir()
    model = Path(args.checkpoint).resolve() if local else args.checkpoint
    paths = dict.fromkeys(path for path in (_table(args, photo) for photo in photos) if path)
    return {path: CaptionTable(path, args.num, model) for path in paths}


def name_pictures(path, photos):
    """-> {photo: path of its attention picture}: `path`, numbered where there are several photos; in a folder each is
    called like its photo. Makes the folder. Raises ValueError for another format than PNG."""
    if path.suffix.lower() in (".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".gif"):
        raise ValueError(f"--attention {path}: drawn as PNG; give a name that ends with .png, or a folder")
    is_file = path.suffix.lower() == ".png" and not path.is_dir()
    (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
    if is_file and len(photos) == 1:
        return {photos[0]: path}
    if is_file:
        return {photo: path.with_stem(f"{path.stem}_{number}") for number, photo in enumerate(photos, 1)}
    named = {}
    for photo in photos:
        stem = Path(photo.name_in_folder).with_suffix("") if photo.folder else Path(photo.name.rstrip("/")).stem
        name, number = str(stem).replace("/", "_").replace("\\", "_"), 1
        while (picture := path / (f"{name}_{number}.png" if number > 1 else f"{name}.png")) in named.values():
            number += 1
        named[photo] = picture
    return named


class Captioner:
    """Model, tokenizer and options of a command."""

    def __init__(self, model, tokenizer, options, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.device = next(model.parameters()).device
        generator = torch.Generator(self.device).manual_seed(args.seed)  # one stream of draws for all batches
        self.options = replace(options, seed=generator)
        self.prompt = encode_prompt(tokenizer, args.prompt)[: model.config.seq_len - 2]
        self.autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)

    def read(self, photos):
        """-> {photo: (what the model takes of it (3, H, W), a small copy to be drawn or None)}, and one line for each
        photo that cannot be read."""
        read, errors = {}, []
        for photo in photos:
            try:
                image, shown = photo.load(), None
                if self.args.grid or self.args.attention:
                    shown = image.copy()
                    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                read[photo] = preprocess(image, **self.model.preprocessing), shown
            except (OSError, ValueError) as error:
                errors.append(str(error))
        return read, errors

    @torch.inference_mode()
    def caption(self, read):
        """What `read` gives -> yields for each photo (photo, captions, their log-probabilities or None without --json,
        ids of the first, 1-D)."""
        pixels = torch.stack([pixels for pixels, _ in read.values()]).to(self.device)  # (B, 3, H, W)
        sequences = torch.tensor([self.prompt] * len(read), device=self.device)  # (B, T)
        given, likely = len(self.prompt), None
        with self.autocast():
            levels = self.model.levels(pixels)  # encoded once for captions and log-probabilities
            ids = generate_ids(self.model, levels, sequences, **vars(self.options))  # (B * num, T + new)
            if self.args.json:
                likely = log_probabilities(self.model, levels, ids, given).view(len(read), -1).tolist()
        for i, (photo, rows) in enumerate(zip(read, ids.cpu().view(len(read), -1, ids.size(1)), strict=True)):
            captions = [self.tokenizer.decode(row[1:]).strip() for row in rows.tolist()]
            first = trim(rows[0], given, self.model.config.eos_token_id)
            yield photo, captions, likely and [round(value, 4) for value in likely[i]], first


if __name__ == "__main__":
    main()
