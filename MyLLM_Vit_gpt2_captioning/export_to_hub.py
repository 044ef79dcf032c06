"""Share a trained captioner on the Hugging Face Hub, with its source, an example and a model card.

    python MyLLM_Vit_gpt2_captioning/export_to_hub.py user/repo                       the model in captioner/
    python MyLLM_Vit_gpt2_captioning/export_to_hub.py user/repo --checkpoint examples/shapes --dry-run shared
    python MyLLM_Vit_gpt2_captioning/export_to_hub.py user/repo --private --license cc-by-nc-4.0

--dry-run writes the folder for you to look at and uploads nothing. The token comes from the environment variable
HF_TOKEN or from `hf auth login`. `caption_image.py photo.jpg --checkpoint user/repo` uses a shared captioner.
"""

import re
import sys
import tempfile
from pathlib import Path

from captioning.command_line.arguments import ToolParser
from captioning.decoding.search import caption_images
from captioning.images.preprocessing import load_image
from captioning.sharing import upload
from captioning.sharing.hub_folder import CHECKPOINT_FILES, copy_checkpoint, source_files, write_folder
from captioning.sharing.model_card import NO_LICENSE, photo_sample, read_facts
from MyLLM_Vit_gpt2_captioning import HF_REPO_ID, OUTPUT_DIR, load_captioner, stored_config


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("repo", nargs="?", default=HF_REPO_ID, metavar="user/repo", help="(default: HF_REPO_ID)")
    parser.add_argument("--checkpoint", default=OUTPUT_DIR, help="folder or hub id of a captioner (default: captioner)")
    parser.add_argument("--dry-run", "--dry_run", type=Path, metavar="DIR", help="write to DIR, upload nothing")
    parser.add_argument("--private", action="store_true", help="a new repository that only you can see")
    parser.add_argument(
        "--license",
        default=NO_LICENSE,
        metavar="ID",
        help="licence of the weights by the Hub's name: apache-2.0, mit, cc-by-nc-4.0, ...; which one is allowed "
        'depends on the data set (default: "other", none stated)',
    )
    parser.add_argument(
        "--dataset", nargs="+", metavar="NAME", help="training data (default: guessed from the names of its folders)"
    )
    parser.add_argument(
        "--samples", nargs="+", default=[], metavar="IMAGE", help="photos for the card, which you may publish"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="scores.json of this checkpoint by evaluate_captions.py (default: those in CHECKPOINT/evaluation_*)",
    )
    args = parser.parse_args(argv)
    try:
        return export(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def export(args):
    """Export as the parsed command line says -> address of the repository, or the folder of a dry run.

    Raises OSError or ValueError before anything is uploaded.
    """
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings before each retry; the final error is reported below
    if not args.repo:
        raise ValueError("no repository is named: give user/repo, or set HF_REPO_ID")
    upload.check_name(args.repo)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise ValueError(f"--license {args.license!r}: expected the Hub's name of one, like apache-2.0 or cc-by-nc-4.0")
    if args.dry_run is None:
        upload.check_token()
    elif args.dry_run.exists() and (not args.dry_run.is_dir() or any(args.dry_run.iterdir())):
        raise FileExistsError(f"{args.dry_run} exists already: give another folder")
    folder, _ = stored_config(args.checkpoint)
    model, tokenizer = load_captioner(folder)  # an unusable checkpoint fails here, before it is shared
    with tempfile.TemporaryDirectory() as scratch:
        is_ours = all((folder / name).is_file() for name in CHECKPOINT_FILES)
        if not is_ours:  # a Hugging Face captioner
            folder = Path(scratch) / "converted"
            model.save_pretrained(folder, tokenizer)
        facts = read_facts(folder, args.repo, args.license, args.dataset, args.scores)
        if not is_ours:
            facts.converted_from = Path(args.checkpoint).name if Path(args.checkpoint).exists() else args.checkpoint
        if args.samples:
            captions = caption_images(model, tokenizer, args.samples)
            pairs = enumerate(zip(args.samples, captions, strict=True), 1)
            facts.samples = [photo_sample(load_image(path), path, caption, n) for n, (path, caption) in pairs]
        target = args.dry_run or Path(scratch) / "shared"
        target.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(target, folder)
        write_folder(target, facts, source_files())
        if facts.license == NO_LICENSE:
            print("no licence is stated for the weights: --license ID states one")
        if args.dry_run:
            print(f"written to {target}; nothing was uploaded")
            return target
        url = upload.upload(target, args.repo, args.private, upload.message_of(facts), refuse_public=True)
    print(f"shared: {url}")
    return url


if __name__ == "__main__":
    main()
