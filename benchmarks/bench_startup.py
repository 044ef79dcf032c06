"""How long does the first caption take, from the shell's prompt to the printed line?

    python benchmarks/bench_startup.py                 5 rounds of every command
    python benchmarks/bench_startup.py --tokens 1      start-up time, with hardly any decoding

`caption_image.py` is compared with the shortest script that does the same with Hugging Face: ViT-B/16 and GPT-2 small
with the same random weights, greedy, equally many tokens. Each run is a new process; the commands run in turns; all
files are in the page cache. Further rows show the small captioner in examples/shapes and the import of torch alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

REPO_ROOT = Path(__file__).resolve().parents[1]
FOLDER = REPO_ROOT / "MyLLM_Vit_gpt2_captioning"
sys.path.insert(0, str(FOLDER))

import torch

import MyLLM_Vit_gpt2_captioning as script
from captioning.model import checkpoint
from captioning.model.tokenizer import CaptionTokenizer
from timing import interleaved, machine, median_and_range

PHOTO = REPO_ROOT / "examples" / "shapes" / "scene_0.png"
HUGGING_FACE = """
import sys
from PIL import Image
from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessor
photo, folder, tokens = sys.argv[1:]
model = VisionEncoderDecoderModel.from_pretrained(folder)
processor, tokenizer = ViTImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
pixels = processor(Image.open(photo).convert("RGB"), return_tensors="pt").pixel_values
ids = model.generate(pixels, max_new_tokens=int(tokens), do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


def write_captioner(folder):
    """Write one captioner with random weights in both formats: `folder`/ours and `folder`/theirs."""
    scenes = json.loads((PHOTO.parent / "scenes.json").read_text(encoding="utf-8"))
    texts = [" and ".join("a " + " ".join(words) for words in objects) for objects in scenes.values()]
    tokenizer = CaptionTokenizer.train(texts, vocab_size=400)  # the model's vocabulary stays GPT-2's, 50257
    config = SimpleNamespace(
        encoder_weights="scratch", decoder_weights="scratch", coupling="final", eos_token_id=tokenizer.eos_token_id
    )
    torch.manual_seed(0)
    model = script.VisionGPT2Model(config)
    with torch.no_grad():  # captions stay within the tokenizer's vocabulary and have no EOS, so all have equal length
        model.gpt.tok_emb.weight[len(tokenizer) :] = 0
        model.gpt.tok_emb.weight[tokenizer.eos_token_id] = 0
    stored = {"model_config": checkpoint.portable(model.config, REPO_ROOT), "preprocessing": model.preprocessing}
    checkpoint.save_checkpoint(folder / "ours", model.state_dict(), stored, tokenizer)
    model.export_to_transformers(folder / "theirs", tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default: 5)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of the caption (default: 20)")
    args = parser.parse_args()
    captions = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_captioner(folder)
        ours = [sys.executable, FOLDER / "caption_image.py", PHOTO, "--max_tokens", args.tokens, "--checkpoint"]
        theirs = [sys.executable, "-c", HUGGING_FACE]
        commands = {
            "ViT-B/16 + GPT-2 small, caption_image.py": [*ours, folder / "ours"],
            "ViT-B/16 + GPT-2 small, Hugging Face": [*theirs, PHOTO, folder / "theirs", args.tokens],
            "examples/shapes, caption_image.py": [*ours, PHOTO.parent],
            "`import torch` alone": [sys.executable, "-c", "import torch"],
        }

        def run(name):
            done = subprocess.run([str(part) for part in commands[name]], capture_output=True, text=True, check=True)
            captions[name] = done.stdout.strip().removeprefix(f"{PHOTO}:").strip()

        seconds = interleaved({name: lambda name=name: run(name) for name in commands}, args.rounds)
    base, other, *_ = commands
    if captions[base] != captions[other]:
        sys.exit(f"the captions differ: {captions[base]!r}, {captions[other]!r}")
    print(f"{machine()}; {args.tokens} tokens, {args.rounds} rounds, page cache warm\n")
    print("| new process | seconds | Hugging Face takes, times |")
    print("| --- | --- | --- |")
    for name in commands:
        ratios = [theirs / own for theirs, own in zip(seconds[other], seconds[name], strict=True)]
        print(f"| {name} | {median_and_range(seconds[name])} | {median_and_range(ratios)} |")


if __name__ == "__main__":
    main()
