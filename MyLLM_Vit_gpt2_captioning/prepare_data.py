"""Download a public dataset into the layout that training reads, check a dataset of yours, reduce its photos once, or
write it as tar shards.

    python MyLLM_Vit_gpt2_captioning/prepare_data.py flickr8k                 1.1 GB, to data/flickr8k
    python MyLLM_Vit_gpt2_captioning/prepare_data.py flickr30k                4.4 GB
    python MyLLM_Vit_gpt2_captioning/prepare_data.py coco2017 --to big/coco   20 GB; twice that while unpacking
    python MyLLM_Vit_gpt2_captioning/prepare_data.py shapes                   nothing to download, it is rendered
    python MyLLM_Vit_gpt2_captioning/prepare_data.py --check data/flickr8k    report and contact sheet
    python MyLLM_Vit_gpt2_captioning/prepare_data.py --check data/flickr8k --with captioner --drop_worst 2%
    python MyLLM_Vit_gpt2_captioning/prepare_data.py --shrink data/flickr30k  smaller photos, to data/flickr30k_256
    python MyLLM_Vit_gpt2_captioning/prepare_data.py --shards data/coco2017   tar shards, to data/coco2017_shards

Run the same command again after an interruption: it goes on where it stopped, and does nothing when all is there.
--check decodes every photo; its exit status is 1 when photos are missing, broken or in two splits. With a captioner it
also finds captions that fit other photos better than their own; --drop_worst lists them for training's --exclude.
--shrink writes a copy of a dataset of any format with photos that load faster; train with --data_dir on the copy.
--shards writes a dataset of any format as tar shards in the WebDataset layout, which training reads as a stream.
"""

import os
import sys
from pathlib import Path

import torch

from captioning.command_line.arguments import ToolParser, integer, percent
from captioning.common.precision import mixed_precision
from captioning.common.stopping import listening
from captioning.data import photo_store, shapes, sources
from captioning.data.conventions import ALL, SPLITS
from captioning.data.dataset_check import check_dataset
from captioning.data.downloads import DATASETS, fetch_dataset
from captioning.data.shards import writing
from captioning.data.token_cache import TokenCache, fill_caches
from captioning.scoring import pair_check
from MyLLM_Vit_gpt2_captioning import DATA_DIR, load_captioner, train_config

SHAPES = "shapes"
NAMES = (*DATASETS, SHAPES)
SHAPES_SCENES = 6000  # for training, as the script renders by default


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="(default: data/NAME, FOLDER_SIDE[_bmp], ...)")
    parser.add_argument("--keep_archives", action="store_true", help="keep what was downloaded, once it is unpacked")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="check the dataset in this folder instead")
    parser.add_argument("--shrink", type=Path, metavar="FOLDER", help="write a copy of this dataset with small photos")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="write this dataset as tar shards")
    parser.add_argument("--captions_file", type=Path, help="the annotation file, when it is not found")
    parser.add_argument("--image_dir", type=Path, help="the folder of photos, when they lie elsewhere")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="check: where to write (default: FOLDER/check)")
    parser.add_argument(
        "--with",
        dest="captioner",
        metavar="CAPTIONER",
        help="check: rank the pairs of photo and caption by this captioner (folder or hub id), which may be trained on "
        "them",
    )
    parser.add_argument(
        "--drop_worst",
        type=percent,
        metavar="P%",
        help="check with a captioner: list so many of the captions, the worst",
    )
    parser.add_argument(
        "--split", choices=(*SPLITS, ALL), default="train", help="check with a captioner: (default: train)"
    )
    parser.add_argument(
        "--others",
        type=integer(1),
        default=pair_check.OTHERS,
        metavar="N",
        help="check with a captioner: photos that each caption is compared with (default: %(default)s)",
    )
    parser.add_argument("--cache_dir", type=Path, metavar="FOLDER", help="check with a captioner: use this token cache")
    parser.add_argument(
        "--side",
        type=integer(1),
        default=photo_store.SIDE,
        help="shrink: pixels of the shorter side (default: %(default)s)",
    )
    parser.add_argument(
        "--uncompressed", action="store_true", help="shrink: to BMP, faster to load than JPEG and 6 times as large"
    )
    parser.add_argument(
        "--num_workers", type=integer(0), default=os.cpu_count(), help="shrink, shards: processes (default: one a core)"
    )
    parser.add_argument(
        "--photos_per_shard", type=integer(1), default=writing.PHOTOS_PER_SHARD, help="shards: (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if sum(choice is not None for choice in (args.name, args.check, args.shrink, args.shards)) != 1:
        parser.error(f"give a dataset ({', '.join(NAMES)}), --check FOLDER, --shrink FOLDER, or --shards FOLDER")

    if (args.captioner and not args.check) or (args.drop_worst and not args.captioner):
        parser.error("--with CAPTIONER needs --check FOLDER, and --drop_worst needs both")

    try:
        with listening("running the same command again goes on from here"):
            prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as reason:
        sys.exit(f"\n{str(reason) or 'interrupted; running the same command again goes on from here'}")


def prepare(args):
    """Do what the parsed command line says. Raises OSError or ValueError when it cannot, Stopped as in `stop_if_asked`,
    and SystemExit for a dataset with problems."""
    unescape = train_config.unescape_captions
    if args.check:
        report = args.report or args.check / "check"
        is_good = check_dataset(args.check, report, args.captions_file, args.image_dir, unescape)
        if args.captioner:
            rank_pairs(args, report)
        if not is_good:
            sys.exit(1)
    elif args.shrink:
        folder = args.shrink.resolve()
        quality = photo_store.UNCOMPRESSED if args.uncompressed else photo_store.QUALITY
        store = args.to or folder.with_name(f"{folder.name}_{args.side}{'_bmp' if args.uncompressed else ''}")
        photo_store.write_store(
            args.shrink, store, args.side, args.captions_file, args.image_dir, args.num_workers, quality, unescape
        )
    elif args.shards:
        source = args.shards.resolve()
        target = args.to or source.with_name(f"{source.name}_shards")
        writing.write_shards(
            args.shards, target, args.photos_per_shard, args.captions_file, args.image_dir, args.num_workers, unescape
        )
    elif args.name == SHAPES:
        render_shapes(args.to or DATA_DIR / SHAPES)
    else:
        fetch_dataset(args.name, args.to or DATA_DIR / args.name, args.keep_archives)


def rank_pairs(args, report):
    """Rank the pairs of a split with a captioner, as the parsed command line says. Raises ValueError for a dataset of
    questions, and for a split without captions."""
    model, tokenizer = load_captioner(args.captioner)
    model.to(train_config.device)
    df = sources.load_split(args.check, args.split, args.captions_file, args.image_dir)
    if "prompt" in df:
        raise ValueError(f"{args.check} asks questions, and only captions can be ranked")
    captions_of = df.groupby("image", sort=False)["caption"].agg(list).to_dict()
    load_batch = None
    if args.cache_dir:
        cache = TokenCache(args.cache_dir, model)
        fill_caches(model, [(cache, list(captions_of), None)])
        load_batch = cache.batch
    autocast, _ = mixed_precision(torch.device(train_config.device))
    with autocast():
        scorer = pair_check.PairScorer(model, tokenizer, load_batch)
        pair_check.check_pairs(scorer, captions_of, args.check, report, args.others, args.drop_worst)


def render_shapes(folder):
    """Render the built-in dataset into `folder`, unless it is there.

    Raises FileExistsError when the folder holds something else, because rendering would replace it.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / shapes.SPLIT_FILE).is_file():
        raise FileExistsError(f"{folder} holds something other than Shapes: give another folder with --to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shapes.write_dataset(folder, train_scenes=SHAPES_SCENES)
    print(f"{SHAPES}: ready in {folder}")


if __name__ == "__main__":
    main()
