"""The lesson blocks: against their formulas, and the whole model against Hugging Face's GPT-2."""

import math
from types import SimpleNamespace

import pytest
import torch

from conftest import randomize
from helpers.mistakes import drop_one_bias, exact_gelu, swap_norms, wrong_epsilon
from MyLLM import MyLLM_nominal
from MyLLM.ch3 import KeyValueCache, MultiHeadAttention
from MyLLM.ch4 import GPTModel, LayerNorm

SIZES = dict(vocab_size=60, embed_dim=32, num_heads=4, depth=3, seq_len=24)


@pytest.fixture(scope="module")
def hf_gpt2():
    """A small Hugging Face GPT-2 whose every parameter is random and large, but for its embeddings: with a variance
    near epsilon in front of the first norm, a wrong epsilon shows. The last norm is larger still, so that the logits
    are, and the tolerance is small beside them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=60, n_embd=32, n_head=4, n_layer=3, n_positions=24, bos_token_id=0, eos_token_id=0
    ))  # fmt: skip
    randomize(hf, std=0.5)
    with torch.no_grad():
        hf.transformer.wte.weight.mul_(0.2)
        hf.transformer.wpe.weight.mul_(0.2)
        hf.transformer.ln_f.weight.mul_(10)
    return hf.eval()


@pytest.fixture
def gpt(hf_gpt2):
    gpt = GPTModel(no_dropout(**SIZES)).eval()
    MyLLM_nominal.load_hf_gpt2_weights(gpt, hf_gpt2.state_dict())
    return gpt


@pytest.fixture
def token_ids():
    return torch.randint(0, 60, (5, 24), generator=torch.Generator().manual_seed(2))


def no_dropout(**sizes):
    dropouts = dict(emb_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0, residual_dropout=0.0)
    return SimpleNamespace(**sizes, **dropouts)


def difference(gpt, hf_gpt2, token_ids):
    with torch.no_grad():
        return (gpt(token_ids) - hf_gpt2(token_ids).logits).abs().max().item()


def test_attention_is_its_formula():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(12, 3), torch.randn(2, 5, 12)
    queries, keys, values = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).split(12, dim=-1))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(4)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    expected = attention.out_proj((scores.softmax(-1) @ values).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("pieces", [[1] * 6, [3, 1, 2], [6]])
def test_cached_attention_equals_uncached(pieces):
    torch.manual_seed(0)
    attention, x, cache = MultiHeadAttention(12, 3), torch.randn(2, 6, 12), KeyValueCache(6)
    parts = [attention(part, cache) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(x))


def test_full_cache_is_an_error():
    cache = KeyValueCache(2)
    with pytest.raises(ValueError, match="room for 2 tokens, not for 3"):
        cache.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


def test_layer_norm_is_its_formula():
    norm, x = LayerNorm(8), torch.randn(3, 8)
    randomize(norm)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / torch.sqrt(variance + 1e-5) * norm.scale + norm.shift)


def test_equals_hf_gpt2(gpt, hf_gpt2, token_ids):
    with torch.no_grad():
        assert hf_gpt2(token_ids).logits.std() > 1
    assert difference(gpt, hf_gpt2, token_ids) < 1e-4


def untransposed_weight(gpt):
    with torch.no_grad():
        weight = gpt.trf_blocks[0].self_attn.out_proj.weight
        weight.copy_(weight.T.clone())


@pytest.mark.parametrize("mistake", [swap_norms, exact_gelu, wrong_epsilon, drop_one_bias, untransposed_weight])
def test_the_equality_test_sees_mistakes(gpt, hf_gpt2, token_ids, mistake):
    mistake(gpt)
    assert difference(gpt, hf_gpt2, token_ids) > 1e-3  # ten times the tolerance of the test above


def test_weights_load_from_a_folder(hf_gpt2, token_ids, tmp_path):
    hf_gpt2.save_pretrained(tmp_path)
    config, sd_hf = MyLLM_nominal.read_hf_gpt2(tmp_path)
    gpt = GPTModel(config).eval()
    MyLLM_nominal.load_hf_gpt2_weights(gpt, sd_hf)
    assert difference(gpt, hf_gpt2, token_ids) < 1e-4


def test_names_without_prefix_and_old_mask_buffers(hf_gpt2, token_ids):
    """As in the file on the hub: no `transformer.` in front, causal masks saved, no separate head."""
    sd_hf = {key.removeprefix("transformer."): value for key, value in hf_gpt2.state_dict().items()}
    del sd_hf["lm_head.weight"]
    sd_hf["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    gpt = GPTModel(no_dropout(**SIZES)).eval()
    MyLLM_nominal.load_hf_gpt2_weights(gpt, sd_hf)
    assert difference(gpt, hf_gpt2, token_ids) < 1e-4


def test_loading_is_strict_and_all_or_nothing(hf_gpt2):
    sd_hf = dict(hf_gpt2.state_dict())
    del sd_hf["transformer.h.1.ln_2.bias"]
    sd_hf["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(32, 64)
    sd_hf["transformer.h.7.ln_1.bias"] = torch.zeros(32)
    sd_hf["lm_head.weight"] = torch.zeros(60, 32)
    gpt = GPTModel(no_dropout(**SIZES))
    before = {key: value.clone() for key, value in gpt.state_dict().items()}
    with pytest.raises(ValueError) as error:
        MyLLM_nominal.load_hf_gpt2_weights(gpt, sd_hf)
    for problem in (
        "h.1.ln_2.bias: missing", "h.0.mlp.c_fc.weight: shape (64, 32) where (128, 32) is needed",
        "h.7.ln_1.bias: unknown key", "lm_head.weight: differs from wte.weight",
    ):  # fmt: skip
        assert problem in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in gpt.state_dict().items())


def test_the_head_stays_tied(gpt, token_ids):
    assert not any("head" in key for key in gpt.state_dict())
    before = gpt(token_ids)
    with torch.no_grad():
        gpt.tok_emb.weight[7] *= 2
    changed = (gpt(token_ids[:, :1]) != before[:, :1])[..., 7]
    assert changed.all()


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a bert model, not gpt2"):
        MyLLM_nominal.read_hf_gpt2(tmp_path)


@pytest.mark.parametrize("key", ["activation_function", "layer_norm_epsilon"])
def test_other_architectures_are_refused(hf_gpt2, tmp_path, key):
    hf_gpt2.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    text = text.replace('"gelu_new"', '"relu"') if key == "activation_function" else text.replace("1e-05", "1e-06")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{key} is"):
        MyLLM_nominal.read_hf_gpt2(tmp_path)


def test_missing_weights_are_refused_not_drawn(hf_gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    hf_gpt2.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("transformer.h.2.ln_1.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights missing in the file: transformer\.h\.2\.ln_1\.bias"):
        MyLLM_nominal.read_hf_gpt2(tmp_path)


def test_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a local folder"):
        MyLLM_nominal.read_hf_gpt2(str(tmp_path))


def test_greedy_continuation_equals_hf(gpt, hf_gpt2, token_ids):
    prompt = token_ids[:, :4]
    ours = MyLLM_nominal.generate(gpt, prompt, 20)
    theirs = hf_gpt2.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(ours, theirs)
    assert len(ours[:, 4:].unique()) > 3


def test_command_line_continues_a_prompt(bpe, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    eos = bpe.eos_token_id
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(bpe), n_embd=32, n_head=2, n_layer=2, n_positions=64, bos_token_id=eos, eos_token_id=eos
    ))  # fmt: skip
    hf.save_pretrained(tmp_path)
    bpe.backend.model.save(str(tmp_path))
    capsys.readouterr()
    MyLLM_nominal.main(["a red dog", "--repo", str(tmp_path), "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("a red dog")
    with pytest.raises(SystemExit, match="give a local folder"):
        MyLLM_nominal.main(["a red dog", "--repo", str(tmp_path / "nothing")])


def test_continuation_ends_with_the_positions(gpt, token_ids):
    assert MyLLM_nominal.generate(gpt, token_ids[:, :20], 100).shape == (5, 24)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        MyLLM_nominal.generate(gpt, token_ids[:, :4], 5, temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens must not be negative"):
        MyLLM_nominal.generate(gpt, token_ids[:, :4], -1)


def test_too_long_a_sequence_is_an_error(gpt):
    with pytest.raises(ValueError, match="25 tokens do not fit into seq_len 24"):
        gpt(torch.zeros(1, 25, dtype=torch.long))


def test_random_start_keeps_the_size_of_outputs():
    """std 0.02 at GPT-2's width, more in a narrower model; less by sqrt(2 * depth) in what writes into the stream."""
    for embed_dim, std in ((768, 0.02), (192, 0.04)):
        block = GPTModel(no_dropout(vocab_size=50, seq_len=8, embed_dim=embed_dim, num_heads=4, depth=2)).trf_blocks[0]
        assert block.mlp.expand.weight.std().item() == pytest.approx(std, rel=0.05)
        assert block.mlp.contract.weight.std().item() == pytest.approx(std / 2, rel=0.05)
        assert not block.self_attn.qkv.bias.any()
