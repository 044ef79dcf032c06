"""Text-only GPT-2: load Hugging Face weights into the lesson code and continue a prompt.

    python MyLLM/MyLLM_nominal.py "A dog runs across the" --max_new_tokens 40
    python MyLLM/MyLLM_nominal.py "Two young men" --repo path/to/gpt2 --temperature 0.8 --seed 1

`--repo` is a hub id or a local folder (config.json, model.safetensors, vocab.json, merges.txt).
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file also runs as a script
from MyLLM.ch4 import GPTModel

# Our name of a parameter: its name in a Hugging Face state_dict; in a block, after `h.<i>.`.
HF_NAMES = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
}
HF_BLOCK_NAMES = {
    "ln_1.scale": "ln_1.weight",
    "ln_1.shift": "ln_1.bias",
    "self_attn.qkv.weight": "attn.c_attn.weight",
    "self_attn.qkv.bias": "attn.c_attn.bias",
    "self_attn.out_proj.weight": "attn.c_proj.weight",
    "self_attn.out_proj.bias": "attn.c_proj.bias",
    "ln_2.scale": "ln_2.weight",
    "ln_2.shift": "ln_2.bias",
    "mlp.expand.weight": "mlp.c_fc.weight",
    "mlp.expand.bias": "mlp.c_fc.bias",
    "mlp.contract.weight": "mlp.c_proj.weight",
    "mlp.contract.bias": "mlp.c_proj.bias",
}


def hf_name(name):
    """The Hugging Face name of our parameter `name`; None if GPT-2 does not have it."""
    if name.startswith("trf_blocks."):
        _, i, name_in_block = name.split(".", 2)
        return f"h.{i}.{HF_BLOCK_NAMES[name_in_block]}" if name_in_block in HF_BLOCK_NAMES else None
    return HF_NAMES.get(name)


@torch.no_grad()
def load_hf_gpt2_weights(gpt, sd_hf, new_layers=()):
    """Copy a Hugging Face GPT-2 state_dict into `gpt`, strictly.

    `new_layers` are the names of layers inside a block that GPT-2 does not have (cross-attention); they keep their
    values. Every other key of either side must have its counterpart with the same shape: otherwise ValueError lists
    all that do not, and nothing is changed.
    """
    sd_hf = {key.removeprefix("transformer."): tensor for key, tensor in sd_hf.items()}
    # Old checkpoints also hold the causal masks, which are not parameters.
    sd_hf = {key: tensor for key, tensor in sd_hf.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    head = sd_hf.pop("lm_head.weight", None)
    problems, copies = [], []
    for name, parameter in gpt.named_parameters():
        key = hf_name(name)
        if key is None:
            if not any(f".{layer}." in name for layer in new_layers):
                problems.append(f"{name}: not a parameter of GPT-2")
            continue
        if key not in sd_hf:
            problems.append(f"{key}: missing")
            continue
        weight = sd_hf.pop(key)
        if key.startswith("h.") and weight.ndim == 2:
            weight = weight.T  # Hugging Face stores these as Conv1D, (in, out); nn.Linear is (out, in)
        if weight.shape != parameter.shape:
            problems.append(f"{key}: shape {tuple(weight.shape)} where {tuple(parameter.shape)} is needed")
        copies.append((parameter, weight))
    problems += [f"{key}: unknown key" for key in sd_hf]
    if head is not None and not any(p is gpt.tok_emb.weight and torch.equal(w, head) for p, w in copies):
        problems.append("lm_head.weight: differs from wte.weight, but the head is tied to the embedding")
    if problems:
        raise ValueError("these GPT-2 weights do not fit the model:\n  " + "\n  ".join(problems))
    for parameter, weight in copies:
        parameter.copy_(weight)  # in place: a new Parameter would lose optimizer state and ties


def gpt2_config(hf, source):
    """A transformers `GPT2Config` -> config for `GPTModel`.

    Raises ValueError that names `source` when it is not a GPT-2 as published by OpenAI (activation, epsilon, ...).
    """
    published = dict(
        model_type=("gpt2",),
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        n_inner=(None, 4 * hf.hidden_size),
        tie_word_embeddings=(True,),
    )
    for key, allowed in published.items():
        if getattr(hf, key, None) not in allowed:
            raise ValueError(f"{source}: {key} is {getattr(hf, key, None)!r}, but GPT-2's is {allowed[0]!r}")
    return SimpleNamespace(
        vocab_size=hf.vocab_size,
        seq_len=hf.n_positions,
        embed_dim=hf.n_embd,
        num_heads=hf.n_head,
        depth=hf.n_layer,
        emb_dropout=hf.embd_pdrop,
        attention_dropout=hf.attn_pdrop,
        mlp_dropout=hf.resid_pdrop,
        residual_dropout=hf.resid_pdrop,
    )


def read_hf_gpt2(repo):
    """Read GPT-2 from a hub id or a local folder -> (config for `GPTModel`, Hugging Face state_dict).

    Raises FileNotFoundError when it cannot be found or downloaded, ValueError when it is not a GPT-2 as published by
    OpenAI (architecture, activation, epsilon) or when weights are missing in the file.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        stored, _ = GPT2Config.get_config_dict(repo)
        if not stored:
            raise OSError("no config.json")
        if stored.get("model_type") != "gpt2":
            raise ValueError(f"{repo}: a {stored.get('model_type')} model, not gpt2")
        model, report = GPT2LMHeadModel.from_pretrained(repo, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"no GPT-2 weights at {repo!r}: it is not a local folder with config.json and model.safetensors, and the "
            "Hugging Face hub did not give them; give a local folder"
        ) from error
    if report["missing_keys"]:  # transformers has initialised them at random
        raise ValueError(f"{repo}: weights missing in the file: {', '.join(sorted(report['missing_keys']))}")
    return gpt2_config(model.config, repo), model.state_dict()


@torch.inference_mode()
def generate(gpt, token_ids, max_new_tokens, temperature=0.0, eos_token_id=None):
    """Continue token_ids (B, T) by up to `max_new_tokens` -> (B, T + new); ends early when all rows have reached EOS.

    temperature 0 is greedy decoding, otherwise tokens are drawn from softmax(logits / temperature). The text ends at
    the model's seq_len at the latest. Raises ValueError for a negative temperature or number of tokens.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, but is {temperature}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, but is {max_new_tokens}")
    gpt.eval()
    max_new_tokens = min(max_new_tokens, gpt.seq_len - token_ids.size(1))
    caches = gpt.new_caches(token_ids.size(1) + max_new_tokens)
    finished = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)  # (B,)
    new_tokens = token_ids
    for _ in range(max_new_tokens):
        logits = gpt(new_tokens, caches)[:, -1]  # (B, vocab_size): only the last position predicts a new token
        if temperature == 0:
            new_tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            new_tokens = torch.multinomial((logits / temperature).softmax(-1), 1)  # (B, 1)
        token_ids = torch.cat([token_ids, new_tokens], dim=1)
        finished |= new_tokens[:, 0] == eos_token_id
        if finished.all():
            break
    return token_ids


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--repo", default="openai-community/gpt2", help="hub id or local folder (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="longest continuation (default: 40)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, with a temperature above 0 (default: 0)")
    args = parser.parse_args(argv)

    from transformers import GPT2Tokenizer

    try:
        config, sd_hf = read_hf_gpt2(args.repo)
        tokenizer = GPT2Tokenizer.from_pretrained(args.repo)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(args.seed)
    prompt_ids = torch.tensor([tokenizer.encode(args.prompt) or [tokenizer.eos_token_id]])  # (1, T)
    try:
        gpt = GPTModel(config)
        load_hf_gpt2_weights(gpt, sd_hf)
        ids = generate(gpt, prompt_ids, args.max_new_tokens, args.temperature, tokenizer.eos_token_id)[0]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(tokenizer.decode(ids).removesuffix(tokenizer.eos_token))


if __name__ == "__main__":
    main()
