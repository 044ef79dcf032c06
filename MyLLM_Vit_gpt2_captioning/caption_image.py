"""Caption photos with a trained captioner.

    python MyLLM_Vit_gpt2_captioning/caption_image.py photo.jpg                            the model in captioner/
    python MyLLM_Vit_gpt2_captioning/caption_image.py examples/shapes/scene_*.png --checkpoint examples/shapes
    python MyLLM_Vit_gpt2_captioning/caption_image.py *.jpg --grid captions.png            also draw them

Captions are greedy unless a temperature is given.
"""

import argparse
import sys
from pathlib import Path

import torch

import checkpoint
import plots
from captions_tokenizer import CaptionTokenizer
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR, VisionGPT2Model, caption_images, train_config
from preprocessing import load_image


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--checkpoint", default=OUTPUT_DIR, help='folder or hub id "user/repo" (default: captioner)')
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: sample at this temperature")
    parser.add_argument("--seed", type=int, default=0, help="for sampling (default: 0)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also draw the photos with their captions")
    args = parser.parse_args(argv)

    try:
        folder = checkpoint.find_folder(args.checkpoint)
        model = VisionGPT2Model.from_pretrained(folder).to(train_config.device)
        torch.manual_seed(args.seed)
        sampling = dict(temperature=args.temperature or 1.0, deterministic=args.temperature == 0)
        captions = caption_images(model, CaptionTokenizer(folder), args.images, **sampling)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    for image, caption in zip(args.images, captions, strict=True):
        print(f"{image}: {caption}")
    if args.grid:
        plots.plot_captions([load_image(image) for image in args.images], captions, [""] * len(captions), args.grid)
        print(f"drawn to {args.grid}")


if __name__ == "__main__":
    main()
