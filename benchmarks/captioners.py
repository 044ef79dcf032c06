"""The captioner that the benchmarks time: ViT-B/16 and GPT-2 small, as our model and, with the same random weights, as
Hugging Face's VisionEncoderDecoderModel."""

import sys
import tempfile
from pathlib import Path

import torch

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"))

import MyLLM_Vit_gpt2_captioning as script


def make_ours(device="cpu", dtype=torch.float32, **changes):
    """-> our model in eval mode with random weights; `changes` are model constants."""
    torch.manual_seed(0)
    constants = dict(encoder_weights="scratch", decoder_weights="scratch", coupling="final") | changes
    return script.VisionGPT2Model(script.complete(constants, script.model_config)).eval().to(device, dtype)


def make_pair(device="cpu", dtype=torch.float32, **changes):
    """-> (our model, Hugging Face's) in eval mode with the same weights; `changes` are model constants."""
    from transformers import VisionEncoderDecoderModel

    ours = make_ours(**changes)
    with tempfile.TemporaryDirectory() as folder:
        ours.export_to_transformers(folder)
        theirs = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    theirs.config.decoder_start_token_id = theirs.config.pad_token_id = ours.config.eos_token_id
    return ours.to(device, dtype), theirs.to(device, dtype)


def make_batch(images, captions_per_image, tokens, device="cpu", vocab_size=50257, img_size=224, dtype=torch.float32):
    """-> (random images (B, 3, H, W), ids of their captions (B * K, tokens) that begin with BOS)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, img_size, img_size, generator=generator)
    ids = torch.randint(vocab_size - 1, (images * captions_per_image, tokens), generator=generator)
    ids[:, 0] = vocab_size - 1
    return pixels.to(device, dtype), ids.to(device)
