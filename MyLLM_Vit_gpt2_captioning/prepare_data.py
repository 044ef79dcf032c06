"""Download a public dataset into the layout that training reads, or check a dataset of yours.

    python MyLLM_Vit_gpt2_captioning/prepare_data.py flickr8k                 1.1 GB, to data/flickr8k
    python MyLLM_Vit_gpt2_captioning/prepare_data.py flickr30k                4.4 GB
    python MyLLM_Vit_gpt2_captioning/prepare_data.py coco2017 --to big/coco   20 GB; twice that while unpacking
    python MyLLM_Vit_gpt2_captioning/prepare_data.py shapes                   nothing to download, it is rendered
    python MyLLM_Vit_gpt2_captioning/prepare_data.py --check data/flickr8k    report and contact sheet

Run the same command again after an interruption: it goes on where it stopped, and does nothing when all is there.
--check decodes every photo; its exit status is 1 when photos are missing, broken or in two splits.
"""

import argparse
import sys
from pathlib import Path

import shapes
from dataset_check import check_dataset
from downloads import DATASETS, fetch_dataset
from MyLLM_Vit_gpt2_captioning import DATA_DIR

SHAPES = "shapes"
NAMES = (*DATASETS, SHAPES)
SHAPES_SCENES = 6000  # for training, as the script renders by default


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name", nargs="?", choices=[*DATASETS, SHAPES], metavar="NAME", help=", ".join([*DATASETS, SHAPES])
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to put it (default: data/NAME)")
    parser.add_argument("--keep_archives", action="store_true", help="keep what was downloaded, once it is unpacked")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="check the dataset in this folder instead")
    parser.add_argument("--captions_file", type=Path, help="check: the annotation file, when it is not found")
    parser.add_argument("--image_dir", type=Path, help="check: the folder of photos, when they lie elsewhere")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="check: where to write (default: FOLDER/check)")
    args = parser.parse_args(argv)
    if (args.name is None) == (args.check is None):
        parser.error(f"give a dataset ({', '.join(NAMES)}), or --check FOLDER")

    try:
        if args.check:
            report = args.report or args.check / "check"
            if not check_dataset(args.check, report, args.captions_file, args.image_dir):
                sys.exit(1)
        elif args.name == SHAPES:
            render_shapes(args.to or DATA_DIR / SHAPES)
        else:
            fetch_dataset(args.name, args.to or DATA_DIR / args.name, args.keep_archives)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; running the same command again goes on from here")


def render_shapes(folder):
    """Render the built-in dataset into `folder`, unless it is there.

    Raises FileExistsError when the folder holds something else, which rendering would replace.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / shapes.SPLIT_FILE).is_file():
        raise FileExistsError(f"{folder} holds something other than Shapes: give another folder with --to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shapes.write_dataset(folder, train_scenes=SHAPES_SCENES)
    print(f"{SHAPES}: ready in {folder}")


if __name__ == "__main__":
    main()
