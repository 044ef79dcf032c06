"""Convert a Hugging Face captioner (VisionEncoderDecoderModel of ViT and GPT-2) into one of ours, and back.

    python MyLLM_Vit_gpt2_captioning/convert_captioner.py nlpconnect/vit-gpt2-image-captioning captioner_hf
    python MyLLM_Vit_gpt2_captioning/convert_captioner.py captioner_hf back_again --verify

SOURCE is a folder or a hub id in either format; TARGET is written in the other one. Tensors are renamed, split and
joined; no value changes. --verify compares logits and greedy captions of both models on the same random images.
"""

import sys
from pathlib import Path

import torch

from captioning.command_line.arguments import ToolParser
from captioning.model import checkpoint, hugging_face
from MyLLM_Vit_gpt2_captioning import REPO_ROOT, load_captioner, stored_config


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("source", help="folder or hub id of a captioner")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist yet")
    parser.add_argument("--verify", action="store_true", help="compare both models' logits and greedy captions")
    args = parser.parse_args(argv)
    try:
        if args.target.exists():
            raise FileExistsError(f"{args.target} exists already: give another folder")
        folder, config = stored_config(args.source)
        model, tokenizer = load_captioner(folder)
        from_hf = hugging_face.is_vision_encoder_decoder(checkpoint.load_config(folder))
        if from_hf:
            model_config = checkpoint.portable(config, REPO_ROOT)
            stored = {"model_config": model_config, "preprocessing": model.preprocessing}
            checkpoint.save_checkpoint(args.target, model.state_dict(), stored, tokenizer)
        else:
            model.export_to_transformers(args.target, tokenizer)
        print(f"{args.source} -> {args.target}, {'ours' if from_hf else 'a VisionEncoderDecoderModel'}")
        if args.verify and not verify(model, folder if from_hf else args.target):
            sys.exit("error: the two models differ")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


@torch.inference_mode()
def verify(model, hf_folder, images=8, tokens=20, tolerance=1e-4):
    """Compare `model` with transformers' on random images and print the differences -> True when they agree.

    They agree when logits differ by at most `tolerance` (in float32, relative to the largest logit if that is above 1)
    and all greedy captions are equal token for token.
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
    options = dict(max_new_tokens=tokens, num_beams=1, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    greedy = theirs.generate(photos, decoder_input_ids=start, **options)
    captions = [model.generate(photo[None], start[:1], tokens, deterministic=True).tolist() for photo in photos]
    same = sum(row[: len(caption)] == caption for row, caption in zip(greedy.tolist(), captions, strict=True))
    print(f"logits of {images} x {tokens} random tokens: largest {largest:.3f}, difference at most {difference:.1e}")
    print(f"greedy captions that are the same, token for token: {same} of {images}")
    return difference <= tolerance * max(1.0, largest) and same == images


if __name__ == "__main__":
    main()
