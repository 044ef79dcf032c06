"""Hugging Face's ViT + GPT-2 captioners and vision towers: the same numbers, the same captions, exact round trips."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import convert_captioner
from captioning.decoding.search import generate_ids
from captioning.model import hugging_face
from captioning.model.loading import load_captioner_weights
from captioning.model.tokenizer import CaptionTokenizer
from conftest import TINY_ENCODER, randomize
from MyLLM.MyLLM_nominal import hf_name

EOS = 7
VIT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=60, image_size=32, patch_size=16
)
GPT2 = dict(
    vocab_size=60, n_embd=32, n_head=2, n_layer=3, n_positions=24, bos_token_id=EOS, eos_token_id=EOS,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip


def make_captioner(vit=None, gpt2=None):
    """A VisionEncoderDecoderModel with large random weights: its captions differ and end at different lengths."""
    torch.manual_seed(0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VIT | (vit or {})), GPT2Config(**GPT2 | (gpt2 or {}))
    )
    model = VisionEncoderDecoderModel(config).eval()
    randomize(model)
    with torch.no_grad():
        model.decoder.transformer.wte.weight[EOS] *= 2
    return model


@pytest.fixture(scope="module")
def hf():
    return make_captioner()


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture
def ours(script, folder):
    return script.VisionGPT2Model.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def starts():
    return torch.full((50, 1), EOS)


def hf_generate(hf, images, starts, tokens, **options):
    return hf.generate(
        images, decoder_input_ids=starts, max_new_tokens=tokens, do_sample=False, eos_token_id=EOS, pad_token_id=EOS,
        **options,
    )  # fmt: skip


def assert_same(ours, theirs):
    """Token for token; the longer one ends in EOS, which is also padding."""
    shorter = min(ours.size(1), theirs.size(1))
    assert torch.equal(ours[:, :shorter], theirs[:, :shorter])
    assert (ours[:, shorter:] == EOS).all()
    assert (theirs[:, shorter:] == EOS).all()


def assert_varied(ids):
    captions = {tuple(row) for row in ids.tolist()}
    lengths = {int((row[1:] == EOS).nonzero()[0]) if (row[1:] == EOS).any() else -1 for row in ids}
    assert len(captions) >= 40
    assert len(lengths) >= 5


# --- captioners -------------------------------------------------------------------------------------------------------


def wrong_vit_epsilon(model):
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2


def keys_for_values(model):
    for block in model.gpt.trf_blocks:
        block.cross_attn.k, block.cross_attn.v = block.cross_attn.v, block.cross_attn.k


def swapped_norms(model):
    for block in model.gpt.trf_blocks:
        block.ln_2, block.ln_cross = block.ln_cross, block.ln_2


def tanh_in_the_vit(model):
    for block in model.encoder.vit.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("mistake", [None, wrong_vit_epsilon, keys_for_values, swapped_norms, tanh_in_the_vit])
def test_logits_are_transformers(hf, ours, images, mistake):
    """Within 1e-4 in float32; with a mistake they are not."""
    ids = torch.randint(0, 60, (50, 9), generator=torch.Generator().manual_seed(6))
    if mistake:
        mistake(ours)
    with torch.no_grad():
        logits = ours.gpt.logits(ours.decode(ids, ours.encoder_states(images)))
        difference = (logits - hf(pixel_values=images, decoder_input_ids=ids).logits).abs().max()
    assert difference > 1e-3 if mistake else difference < 1e-4


def test_loss_is_transformers(hf, ours, images):
    """Their labels are unshifted and start behind BOS; ours are shifted already."""
    words = torch.randint(8, 60, (50, 9), generator=torch.Generator().manual_seed(6))
    hf = copy.deepcopy(hf)
    hf.config.decoder_start_token_id = hf.config.pad_token_id = EOS
    with torch.no_grad():
        theirs = hf(pixel_values=images, labels=words).loss
        input_ids = torch.cat([torch.full((50, 1), EOS), words[:, :-1]], dim=1)
        torch.testing.assert_close(ours(images, input_ids, words), theirs, atol=1e-5, rtol=1e-5)


def test_greedy_captions_are_transformers(hf, ours, images, starts):
    greedy = generate_ids(ours, images, starts, 20, deterministic=True)
    assert_varied(greedy)
    assert_same(greedy, hf_generate(hf, images, starts, 20, num_beams=1))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_beams_are_transformers(hf, ours, images, starts, length_penalty, early_stopping):
    """All four beams of 50 images, in order; and a batch equals one image at a time."""
    options = dict(num_beams=4, num_return_sequences=4, length_penalty=length_penalty, early_stopping=early_stopping)
    beams = generate_ids(ours, images, starts, 20, **options)
    assert_same(beams, hf_generate(hf, images, starts, 20, **options))
    if length_penalty == 1.0:
        assert_varied(beams[::4])
        for i in range(10):
            assert_same(generate_ids(ours, images[i : i + 1], starts[:1], 20, **options), beams[4 * i : 4 * i + 4])


@pytest.mark.parametrize("search", [dict(num_beams=1, deterministic=True), dict(num_beams=4)])
@pytest.mark.parametrize("option", [dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=2), dict(min_tokens=7)])
def test_filters_are_transformers(hf, ours, images, starts, search, option):
    theirs = {"min_new_tokens" if name == "min_tokens" else name: value for name, value in option.items()}
    theirs = hf_generate(hf, images, starts, 20, num_beams=search["num_beams"], **theirs)
    assert_same(generate_ids(ours, images, starts, 20, **search, **option), theirs)
    plain = generate_ids(ours, images, starts, 20, **search)
    assert plain.shape != theirs.shape or not torch.equal(plain, theirs)


def test_a_prompt_is_transformers(hf, ours, images):
    prompts = torch.randint(8, 60, (50, 4), generator=torch.Generator().manual_seed(8))
    prompts[:, 0] = EOS
    assert_same(generate_ids(ours, images, prompts, 12, num_beams=4), hf_generate(hf, images, prompts, 12, num_beams=4))


@pytest.mark.parametrize(
    ("vit", "gpt2"),
    [
        (dict(hidden_size=32), {}),
        (dict(qkv_bias=False), {}),
        (dict(image_size=48, layer_norm_eps=1e-3), dict(n_layer=1)),
    ],
    ids=["equal widths: no projection", "no bias", "another size"],
)
def test_round_trip_is_exact(script, vit, gpt2, bpe, tmp_path):
    """Import, export, import: every bit is the same; transformers loads the export without a word and agrees."""
    hf = make_captioner(vit, gpt2 | dict(vocab_size=len(bpe)))
    hf.save_pretrained(tmp_path / "hf")
    first = script.VisionGPT2Model.from_pretrained(tmp_path / "hf")
    first.export_to_transformers(tmp_path / "back", bpe)
    second = script.VisionGPT2Model.from_pretrained(tmp_path / "back")
    assert first.config == second.config
    assert first.preprocessing == second.preprocessing
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    stored, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert stored.keys() == exported.keys()
    same = {name for name in stored if torch.equal(stored[name], exported[name])}
    assert stored.keys() - same == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}  # captions use neither
    _, report = VisionEncoderDecoderModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    assert convert_captioner.verify(first, tmp_path / "back")
    assert CaptionTokenizer(tmp_path / "back").encode("a red dog") == bpe.encode("a red dog")


def test_transformers_reads_tokenizer_and_preprocessing_of_an_export(ours, bpe, tmp_path):
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    from captioning.images.preprocessing import preprocess

    ours.preprocessing |= dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    ours.export_to_transformers(tmp_path, bpe)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("two young men").input_ids == [bpe.bos_token_id, *bpe.encode("two young men")]
    assert tokenizer.eos_token_id == bpe.eos_token_id
    photo = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(photo), return_tensors="pt").pixel_values[0]
    assert (preprocess(photo, **ours.preprocessing) - theirs).abs().max() < 0.02  # they round to 8 bits once more
    assert hugging_face.read_preprocessing(tmp_path)["mean"] == (0.1, 0.2, 0.3)


def test_the_pipeline_of_transformers_captions_with_an_export(script, tiny_config, bpe, tmp_path):
    """Without code of ours; the photos have the encoder's size, so that nobody resizes them."""
    import numpy as np
    from PIL import Image
    from transformers import pipeline

    from captioning.decoding.search import caption_images

    tiny_config.coupling = "final"
    ours = script.VisionGPT2Model(tiny_config).eval()
    randomize(ours)
    ours.export_to_transformers(tmp_path, bpe)
    size = ours.preprocessing["img_size"]
    pixels = np.random.default_rng(0).integers(0, 255, (2, size, size, 3), dtype=np.uint8)
    photos = [Image.fromarray(photo) for photo in pixels]
    captioner = pipeline("image-text-to-text", model=str(tmp_path))
    for prompt, options in (("", {}), ("a red", {}), ("", dict(num_beams=3))):
        found = captioner(images=photos, text=[prompt] * 2, generate_kwargs=dict(max_new_tokens=9, **options))
        expected = caption_images(ours, bpe, photos, max_tokens=9, prompt=prompt, **options)
        assert [record["generated_text"].strip() for record in found] == expected
    assert len(captioner(images=photos[0], text="", return_tensors=True)[0]["generated_token_ids"]) <= 24


def test_an_old_checkpoint_with_masks_and_an_explicit_head(script, folder, ours, tmp_path):
    """As uploaded by older versions: pytorch_model.bin, causal masks among the weights, the tied head spelt out."""
    weights = load_file(folder / "model.safetensors")
    weights["decoder.lm_head.weight"] = weights["decoder.transformer.wte.weight"]
    for i in range(3):
        weights[f"decoder.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
        weights[f"decoder.transformer.h.{i}.crossattention.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | dict(decoder_start_token_id=EOS, eos_token_id=EOS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.5] * 3, size=32, resample=3))
    )
    model = script.VisionGPT2Model.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.preprocessing == dict(img_size=32, mean=(0.5, 0.4, 0.3), std=(0.5,) * 3, resample="bicubic")


def test_sharded_weights(script, hf, ours, tmp_path):
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    model = script.VisionGPT2Model.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_that_do_not_fit_change_nothing(folder, ours, tmp_path):
    """Missing, extra and wrongly shaped keys are all listed, under the names in the file."""
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.transformer.h.1.crossattention.q_attn.bias"]
    weights["decoder.transformer.h.9.ln_1.weight"] = torch.zeros(32)
    weights["encoder.encoder.layer.0.attention.attention.key.weight"] = torch.zeros(24, 25)
    weights["decoder.transformer.h.0.mlp.c_fc.weight"] = torch.zeros(128, 32)  # not transposed
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_captioner_weights(ours, tmp_path, hf_name)
    text = str(error.value)
    assert str(tmp_path) in text
    assert "h.1.crossattention.q_attn.bias: missing" in text
    assert "h.9.ln_1.weight: unknown key" in text
    assert "layer.0.attention.attention.key.weight: shape (24, 25) where (24, 24) is needed" in text
    assert "h.0.mlp.c_fc.weight: shape (128, 32) where (32, 128) is needed" in text
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in before.items())


def test_an_untied_head_is_refused(folder, ours, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["decoder.lm_head.weight"] = weights["decoder.transformer.wte.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*wte"):
        load_captioner_weights(ours, tmp_path, hf_name)


def change(config, part, **values):
    (config[part] if part else config).update(values)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("decoder", dict(model_type="bert"), "model_type is 'bert', but GPT-2's is 'gpt2'"),
        ("encoder", dict(model_type="deit"), "the encoder is deit, only ViT can be read"),
        ("encoder", dict(hidden_act="relu"), "the encoder is vit with relu"),
        ("decoder", dict(activation_function="gelu"), "activation_function is 'gelu', but GPT-2's is 'gelu_new'"),
        ("decoder", dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (None, dict(decoder_start_token_id=3), "captions begin with id 3 and end with 7; here one id does both"),
    ],
)
def test_captioners_of_another_kind_are_refused_by_name(script, folder, tmp_path, part, values, message):
    config = json.loads((folder / "config.json").read_text())
    change(config, part, **values)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        script.VisionGPT2Model.from_pretrained(tmp_path)


def test_sharded_pickles_on_the_hub(script, hf, ours, tmp_path, monkeypatch):
    """The index comes with the small files; the shards that it names are then fetched too."""
    from captioning.model import checkpoint

    weights, stored = load_file_of(hf, tmp_path), tmp_path / "hub"
    stored.mkdir()
    names = sorted(weights)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, stored / file)
    index = dict(weight_map={key: file for file, keys in shards.items() for key in keys})
    (stored / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (stored / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())

    def download(source, files=checkpoint.find_folder.__defaults__[0]):
        (tmp_path / "cache").mkdir(exist_ok=True)
        for pattern in files:
            for path in stored.glob(pattern):
                (tmp_path / "cache" / path.name).write_bytes(path.read_bytes())
        return tmp_path / "cache"

    monkeypatch.setattr(checkpoint, "find_folder", download)
    monkeypatch.setattr(hugging_face, "find_folder", download)
    model = script.VisionGPT2Model.from_pretrained("somebody/captioner")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())


def load_file_of(hf, tmp_path):
    hf.save_pretrained(tmp_path / "hf")
    return load_file(tmp_path / "hf" / "model.safetensors")


def test_half_precision_checkpoints_agree(script, hf, bpe, tmp_path, capsys):
    copy.deepcopy(hf).half().save_pretrained(tmp_path / "hf")
    model = script.VisionGPT2Model.from_pretrained(tmp_path / "hf")
    assert model.gpt.tok_emb.weight.dtype == torch.float32
    assert convert_captioner.verify(model, tmp_path / "hf")


def test_a_tokenizer_of_another_captioner_is_refused(script, folder, bpe, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(bpe.to_json())
    with pytest.raises(ValueError, match="the tokenizer ends captions with id 0, the captioner with 7"):
        script.load_captioner(tmp_path)


def test_start_from_our_own_captioner_in_python(script, tiny_model, bpe, tmp_path):
    """What the config does not give is the captioner's; a part of the preprocessing changes only that part."""
    tiny_model.preprocessing["mean"] = (0.1, 0.2, 0.3)
    config = {"model_config": vars(tiny_model.config), "preprocessing": tiny_model.preprocessing}
    script.checkpoint.save_checkpoint(tmp_path, tiny_model.state_dict(), config, bpe)
    model = script.VisionGPT2Model.from_pretrained(
        SimpleNamespace(start_from=str(tmp_path), mlp_dropout=0.5, preprocessing={"resample": "bilinear"})
    )
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())
    assert model.config.mlp_dropout == 0.5
    assert model.preprocessing == dict(img_size=32, mean=[0.1, 0.2, 0.3], std=[0.5] * 3, resample="bilinear")


def test_a_folder_without_weights_or_of_another_model(script, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin is there"):
        script.VisionGPT2Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a bert model, not a captioner"):
        script.VisionGPT2Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(coupling="stepped"), 'has coupling "final", this captioner has "stepped"'),
        (dict(encoder="resnet10t", encoder_options={}), "resnet10t is no ViT"),
        (dict(encoder="vit_base_patch16_clip_quickgelu_224"), "has the activation QuickGELU"),
        (dict(encoder_options=TINY_ENCODER | dict(no_embed_class=True)), "has no learned positions"),
        (dict(encoder="vit_base_patch16_clip_224"), "no place for these layers:\n.*norm_pre"),
        (dict(encoder="vit_small_patch14_reg4_dinov2", encoder_options=TINY_ENCODER), "5 tokens before its patches"),
    ],
)
def test_what_transformers_cannot_hold_is_not_exported(script, tiny_config, tmp_path, changes, message):
    for key, value in (dict(coupling="final") | changes).items():
        setattr(tiny_config, key, value)
    with pytest.raises(ValueError, match=message):
        script.VisionGPT2Model(tiny_config).export_to_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_there_and_back(script, folder, bpe, tmp_path, capsys):
    """The command: ours from theirs, theirs from ours, compared on the way; a target that exists is left alone."""
    hf = make_captioner(gpt2=dict(vocab_size=len(bpe), bos_token_id=bpe.eos_token_id, eos_token_id=bpe.eos_token_id))
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(bpe.to_json())
    convert_captioner.main([str(tmp_path / "hf"), str(tmp_path / "ours"), "--verify"])
    convert_captioner.main([str(tmp_path / "ours"), str(tmp_path / "hf2"), "--verify"])
    assert capsys.readouterr().out.count("token for token: 8 of 8") == 2
    weights = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "hf2" / "model.safetensors")
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items() if "pooler" not in name)
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    with pytest.raises(SystemExit, match="exists already"):
        convert_captioner.main([str(tmp_path / "ours"), str(tmp_path / "hf2")])


def test_training_starts_from_a_hugging_face_captioner(script, bpe, flickr, tmp_path):
    """--start_from brings model, tokenizer and preprocessing, also where the recipe of Shapes says otherwise; after an
    epoch at a learning rate of nothing it is still that captioner."""
    hf = make_captioner(gpt2=dict(vocab_size=len(bpe), bos_token_id=bpe.eos_token_id, eos_token_id=bpe.eos_token_id))
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(bpe.to_json())
    arguments = ["--start_from", tmp_path / "hf", "--data_dir", flickr, "--model_path", tmp_path / "out", "--epochs", 1]
    arguments += [
        "--freeze_epochs_gpt",
        0,
        "--freeze_epochs_all",
        0,
        "--batch_size",
        4,
        "--lr",
        1e-9,
        "--device",
        "cpu",
    ]
    script.main([str(word) for word in arguments])
    first, trained = (script.VisionGPT2Model.from_pretrained(tmp_path / name) for name in ("hf", "out"))
    assert trained.preprocessing["resample"] == "bilinear"
    assert (trained.config.encoder_weights, trained.config.decoder_weights) == ("pretrained", "pretrained")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], atol=1e-6, rtol=1e-6)


# --- GPT-2 and vision towers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 20)], ids=["gpt2-medium", "gpt2-large"])
def test_larger_gpt2_load(script, tmp_path, width, heads):
    """Random weights at full width, two layers, on a ViT of another width."""
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(n_embd=width, n_head=heads, n_layer=2, n_positions=64, vocab_size=500,
                                    bos_token_id=0, eos_token_id=0)).eval()  # fmt: skip
    hf.save_pretrained(tmp_path)
    config = dict(embed_dim=width, num_heads=heads, depth=2, seq_len=64, vocab_size=500, decoder_weights=str(tmp_path))
    config |= dict(encoder="vit_tiny_patch16_224", encoder_options=TINY_ENCODER, encoder_weights="scratch")
    model = script.VisionGPT2Model.from_pretrained(SimpleNamespace(**config)).eval()
    for block in model.gpt.trf_blocks:
        nn.init.zeros_(block.cross_attn.c_proj.weight)
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        ours = model.gpt.logits(model.decode(ids, model.encoder_states(torch.randn(2, 3, 32, 32))))
        torch.testing.assert_close(ours, hf(ids).logits, atol=1e-4, rtol=1e-4)


TOWER = dict(VIT, intermediate_size=96)


def vit_tower():
    return ViTModel(ViTConfig(**TOWER))


def classifier():
    return ViTForImageClassification(ViTConfig(**TOWER, layer_norm_eps=1e-3))


def clip_vision():
    return CLIPVisionModel(CLIPVisionConfig(**TOWER))


def clip_gelu():
    return CLIPVisionModel(CLIPVisionConfig(**TOWER, hidden_act="gelu"))


def whole_clip():
    text = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1, vocab_size=9
    )
    return CLIPModel(CLIPConfig(vision_config=dict(TOWER), text_config=text))


@pytest.mark.parametrize("make", [vit_tower, classifier, clip_vision, clip_gelu, whole_clip])
def test_transformers_towers_as_encoder(script, tiny_config, bpe, make, tmp_path):
    """Stepped: the tokens after each block are transformers' hidden states. Final: through the tower's last norm."""
    tower = make().eval()
    randomize(tower, std=0.2)
    tower.save_pretrained(tmp_path / "tower")
    mean = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"shortest_edge": 32})
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(mean))
    tiny_config.encoder, tiny_config.encoder_options = str(tmp_path / "tower"), {}
    tiny_config.encoder_weights = "pretrained"
    model = script.VisionGPT2Model.from_pretrained(tiny_config).eval()
    images = torch.randn(3, 3, 32, 32)
    vision = getattr(tower, "vision_model", getattr(tower, "vit", tower))
    with torch.no_grad():
        hidden = vision(images, output_hidden_states=True).hidden_states
        tokens = model.encoder.embed(images)
        for i, expected in enumerate(hidden):
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
            if i < 2:
                tokens = model.encoder.step(i, tokens)
        tiny_config.coupling = "final"
        final = script.VisionGPT2Model.from_pretrained(tiny_config).eval()
        norm = getattr(vision, "layernorm", None) or vision.post_layernorm
        torch.testing.assert_close(final.encoder.embed(images), norm(hidden[-1]), atol=1e-5, rtol=1e-5)
    assert model.preprocessing["mean"] == (0.1, 0.2, 0.3)
    # A checkpoint of it needs the tower's files no more.
    config = {"model_config": vars(model.config), "preprocessing": model.preprocessing}
    script.checkpoint.save_checkpoint(
        tmp_path / "saved", model.state_dict(), config, CaptionTokenizer.train(["a"], 300)
    )
    (tmp_path / "tower").rename(tmp_path / "gone")
    again = script.VisionGPT2Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encoder.embed(images), model.encoder.embed(images))


def test_a_tower_of_another_kind_is_refused_by_name(script, tiny_config, tmp_path):
    from transformers import BeitConfig

    BeitConfig().save_pretrained(tmp_path)
    tiny_config.encoder = str(tmp_path)
    with pytest.raises(ValueError, match=r"the encoder is beit with gelu; only these can be read: vit with gelu, clip"):
        script.VisionGPT2Model(tiny_config)


def test_a_tower_as_weights_of_another_architecture_is_refused(script, tiny_config, tmp_path):
    """Shapes alone would fit: activation, heads and preprocessing would be silently wrong."""
    clip_vision().save_pretrained(tmp_path / "clip")
    tiny_config.encoder, tiny_config.encoder_options = "vit_base_patch16_clip_224", TINY_ENCODER
    tiny_config.encoder_weights = str(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"clip is a transformers model: give it as --encoder"):
        script.VisionGPT2Model.from_pretrained(tiny_config)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (dict(do_rescale=True, rescale_factor=1 / 127.5), "here it is always 1/255"),
        (dict(resample=1), "resample 1 is none of"),
    ],
)
def test_preprocessing_that_is_not_done_here_is_refused(tmp_path, stored, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        hugging_face.read_preprocessing(tmp_path)


def test_preprocessing_in_its_other_forms(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=dict(image_mean=0.4, resample=3))))
    assert hugging_face.read_preprocessing(tmp_path) == dict(mean=(0.4,) * 3, resample="bicubic")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(do_normalize=False)))
    assert hugging_face.read_preprocessing(tmp_path) == dict(mean=(0.0,) * 3, std=(1.0,) * 3)


def test_a_tower_that_is_not_to_be_had(script, tiny_config):
    tiny_config.encoder = "nobody/nothing"
    with pytest.raises(FileNotFoundError, match="nobody/nothing: not a checkpoint folder, and not available"):
        script.VisionGPT2Model(tiny_config)
