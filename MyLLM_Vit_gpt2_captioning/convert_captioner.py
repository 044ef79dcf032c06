"""Turn a Hugging Face captioner (VisionEncoderDecoderModel of ViT and GPT-2) into one of ours, and back.

    python MyLLM_Vit_gpt2_captioning/convert_captioner.py nlpconnect/vit-gpt2-image-captioning captioner_hf
    python MyLLM_Vit_gpt2_captioning/convert_captioner.py captioner_hf back_again --verify

SOURCE is a folder or a hub id in either format; TARGET is written in the other one. The weights are renamed, never
recomputed. --verify lets transformers and this code caption the same random images and compares.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from captioning.model import checkpoint, hugging_face
from MyLLM_Vit_gpt2_captioning import REPO_ROOT, load_captioner, read_config


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or hub id of a captioner")
    parser.add_argument("target", type=Path, help="folder to write, which must not be there yet")
    parser.add_argument("--verify", action="store_true", help="compare both models' scores and greedy captions")
    args = parser.parse_args(argv)
    try:
        if args.target.exists():
            raise FileExistsError(f"{args.target} is there already: give another folder")
        folder, config = read_config(args.source)
        model, tokenizer = load_captioner(folder)
        theirs = hugging_face.is_vision_encoder_decoder(checkpoint.load_config(folder))
        if theirs:
            kept = checkpoint.portable(SimpleNamespace(**config), REPO_ROOT)
            stored = {"model_config": kept, "preprocessing": model.preprocessing}
            checkpoint.save_checkpoint(args.target, model.state_dict(), stored, tokenizer)
        else:
            model.export_to_transformers(args.target, tokenizer)
        print(f"{args.source} -> {args.target}, {'ours' if theirs else 'a VisionEncoderDecoderModel'}")
        if args.verify and not verify(model, folder if theirs else args.target):
            sys.exit("error: the two models differ")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


@torch.inference_mode()
def verify(model, hf_folder, images=8, tokens=20, tolerance=1e-4):
    """Compare `model` with transformers' on random images, print the figures -> True when they agree.

    They agree when logits differ by at most `tolerance` (float32, relative to the largest logit where that is above 1)
    and greedy captions are the same token for token.
    """
    from transformers import VisionEncoderDecoderModel

    theirs = VisionEncoderDecoderModel.from_pretrained(hf_folder).float().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = min(tokens, model.config.seq_len - 1)
    size, eos = model.preprocessing["img_size"], model.config.eos_token_id
    photos = torch.randn(images, 3, size, size, generator=generator)  # (B, 3, H, W)
    ids = torch.randint(0, model.config.vocab_size, (images, tokens), generator=generator)  # (B, T)
    ours = model.gpt.logits(model.decode(ids, model.encoder_states(photos)))  # (B, T, vocab_size)
    reference = theirs(pixel_values=photos, decoder_input_ids=ids).logits
    difference, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
    start = torch.full((images, 1), eos)
    greedy = theirs.generate(
        photos, decoder_input_ids=start, max_new_tokens=tokens, num_beams=1, do_sample=False,
        eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    captions = [model.generate(photo[None], start[:1], tokens, deterministic=True).tolist() for photo in photos]
    same = sum(row[: len(caption)] == caption for row, caption in zip(greedy.tolist(), captions, strict=True))
    print(f"logits of {images} x {tokens} random tokens: largest {largest:.3f}, difference at most {difference:.1e}")
    print(f"greedy captions that are the same, token for token: {same} of {images}")
    return difference <= tolerance * max(1.0, largest) and same == images


if __name__ == "__main__":
    main()
