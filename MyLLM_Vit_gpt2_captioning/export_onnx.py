"""Export a captioner to ONNX, to caption photos without torch: with onnxruntime, or in a browser without a server.

    python MyLLM_Vit_gpt2_captioning/export_onnx.py FOLDER                             the captioner in captioner/
    python MyLLM_Vit_gpt2_captioning/export_onnx.py FOLDER --checkpoint examples/shapes --int8
    python MyLLM_Vit_gpt2_captioning/export_onnx.py --web FOLDER --checkpoint examples/shapes

FOLDER gets the two graphs and example_onnx.py, which captions photos with onnxruntime, NumPy and Pillow. The folder of
--web is a page for any web server that captions a photo in the visitor's browser. Before anything is written, the
graphs caption photos beside the model, and what was found is printed.
"""

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from captioning.command_line.arguments import ToolParser, integer
from captioning.command_line.photo_arguments import find_photos
from captioning.data.shapes import draw_scene, render_scene
from captioning.sharing import onnx_export, onnx_page
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, load_captioner, stored_config

TOLERANCE = 1e-3  # of float32 logits, relative to the largest if that is above 1


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="folder to write, which does not exist")
    parser.add_argument("--web", type=Path, metavar="FOLDER", help="write a page for the browser, graphs included")
    parser.add_argument("--checkpoint", default=OUTPUT_DIR, help="folder or hub id of a captioner (default: captioner)")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits: a third of the size, other captions")
    parser.add_argument(
        "--photos", nargs="+", metavar="IMAGE", help="files or folders to compare with (default: scenes of Shapes)"
    )
    parser.add_argument(
        "--count", type=integer(1), default=50, metavar="N", help="photos to compare with (default: 50)"
    )
    parser.add_argument(
        "--onnxruntime_web",
        default=os.environ.get("ONNXRUNTIME_WEB"),
        metavar="PACKAGE",
        help="for --web: the npm package onnxruntime-web, a folder or a .tgz (default: the environment variable "
        "ONNXRUNTIME_WEB, else it is downloaded once, 33 MB)",
    )
    args = parser.parse_args(argv)
    try:
        write(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def write(args):
    """Export and compare as the parsed command line says, then write. Raises ImportError, OSError or ValueError."""
    targets = [folder for folder in (args.folder, args.web) if folder is not None]
    if not targets:
        raise ValueError("nothing to write: give a FOLDER, or --web FOLDER for a page")
    for folder in targets:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists already: give another folder")
    onnx_export.require_libraries()
    photos = chosen_photos(args.photos, args.count)
    checkpoint, _ = stored_config(args.checkpoint)
    model, tokenizer = load_captioner(checkpoint)
    runtime = onnx_page.read_runtime(args.onnxruntime_web or onnx_page.fetch_package()) if args.web else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "graphs"  # its permissions are those of any new folder
        scratch.mkdir()
        onnx_export.export(model, tokenizer, scratch, args.int8)
        found = onnx_export.compare(model, tokenizer, scratch, photos)
        for line in report(found, scratch, args.int8):
            print(line)
        if not args.int8 and not found.logits <= TOLERANCE * max(1.0, found.largest):
            raise ValueError("the graphs compute something else than the model; nothing was written")
        for folder in targets:
            shutil.copytree(scratch, folder, dirs_exist_ok=True)
    if args.web:
        onnx_page.write_page(args.web, runtime)
    for folder in targets:
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"written: {folder}, {size / 1e6:.1f} MB")
    if args.web:
        print(f"to see the page: python -m http.server --directory {args.web}, then http://localhost:8000")


def chosen_photos(arguments, count):
    """The `count` first photos of the command line (PIL images), or scenes of Shapes that no model was trained on."""
    if arguments:
        return [photo.load() for photo in find_photos(arguments)[:count]]
    rng = random.Random(0)
    return [render_scene(rng, draw_scene(rng, held_out=True)) for _ in range(count)]


def report(found, folder, int8):
    """The result of `onnx_export.compare` -> lines to print."""
    names = (onnx_export.ENCODER_FILE, onnx_export.DECODER_FILE)
    sizes = ", ".join(f"{name} {(folder / name).stat().st_size / 1e6:.1f} MB" for name in names)
    n = found.photos
    yield f"{sizes} ({'int8' if int8 else 'float32'})"
    yield f"photos with the same pixels: {found.pixels} of {n}"
    yield f"greedy captions that are the same: {found.greedy} of {n}, by {found.beams} beams: {found.beam} of {n}"
    yield f"logits: largest {found.largest:.3f}, difference at most {found.logits:.1e}"
    threads = torch.get_num_threads()
    yield (
        f"a greedy caption, one photo at a time: {found.onnx_ms:.1f} ms, by torch {found.torch_ms:.1f} ms "
        f"(medians, {threads} thread{'s' * (threads > 1)})"
    )


if __name__ == "__main__":
    main()
