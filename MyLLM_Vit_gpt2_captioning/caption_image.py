"""Caption photos with a trained captioner.

    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg                            the model in captioner/
    python MyLLM_Vit_gpt2_captioning/caption_image.py examples/shapes/scene_*.png --checkpoint examples/shapes
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --beam 4 --num 3           the three best of 4 beams
    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg --sample --top_p 0.9 --num 5
    python MyLLM_Vit_gpt2_captioning/caption_image.py *.jpg --grid captions.png            also draw them

Captions are greedy unless beams or sampling are asked for.
"""

import argparse
import sys
from pathlib import Path

import torch

import plots
from command_line import add_decoding_arguments, decoding_options
from decoding import caption_images
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, load_captioner, train_config
from optimization import mixed_precision
from preprocessing import load_image


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--checkpoint",
        default=OUTPUT_DIR,
        help='folder or hub id "user/repo", ours or a Hugging Face ViT + GPT-2 (default: captioner)',
    )
    add_decoding_arguments(parser)
    parser.add_argument("--max_tokens", type=int, default=50, help="longest caption, in tokens (default: 50)")
    parser.add_argument("--num", type=int, default=1, help="captions an image (default: 1)")
    parser.add_argument("--prompt", default="", help="how the caption begins")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also draw the photos with their captions")
    args = parser.parse_args(argv)

    try:
        model, tokenizer = load_captioner(args.checkpoint)
        options = dict(max_tokens=args.max_tokens, num_return_sequences=args.num, **decoding_options(args))
        autocast, _ = mixed_precision(torch.device(train_config.device), args.precision)
        with autocast():
            found = caption_images(model.to(train_config.device), tokenizer, args.images, prompt=args.prompt, **options)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    captions = [caption if args.num > 1 else [caption] for caption in found]
    for image, several in zip(args.images, captions, strict=True):
        for caption in several:
            print(f"{image}: {caption}")
    if args.grid:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        photos = [load_image(image) for image in args.images]
        plots.plot_captions(photos, [several[0] for several in captions], [""] * len(photos), args.grid)
        print(f"drawn to {args.grid}")


if __name__ == "__main__":
    main()
