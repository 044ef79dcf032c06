"""Tokens, labels and masks, on cases written by hand."""

import pickle
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from captioning.data import unreadable_photos
from captioning.decoding.attention_maps import group_words
from captioning.decoding.search import generate_ids
from captioning.model.tokenizer import END_OF_TEXT, CaptionTokenizer, read_prompt, split_characters, unknown_words
from conftest import CAPTIONS


def test_shift_labels(script):
    assert script._shift_labels([9, 4, 5, 9]) == [4, 5, 9, 9]
    assert script._shift_labels([9]) == [9]


def test_pad_token_batch(script, bpe):
    padded = script._pad_token_batch(bpe, [[1, 2, 3], [4]])
    assert padded.dtype == torch.long
    assert padded.tolist() == [[1, 2, 3], [4, bpe.pad_token_id, bpe.pad_token_id]]


def test_bos_equals_eos_equals_pad(bpe):
    assert bpe.bos_token_id == bpe.eos_token_id == bpe.pad_token_id
    assert bpe.pad_token == bpe.eos_token == END_OF_TEXT


def test_masks_go_by_length_and_eos_is_learned(script, bpe):
    eos, image = bpe.eos_token_id, torch.zeros(3, 2, 2)
    long, short = [eos, 5, 6, 7, eos], [eos, 5, eos]
    batch = [(image, ids, script._shift_labels(ids)) for ids in (long, short)]
    images, input_ids, labels = script.collate_fn(batch, bpe)
    assert images.shape == (2, 3, 2, 2)
    assert input_ids.tolist() == [long, [*short, eos, eos]]
    assert labels.tolist() == [[5, 6, 7, eos, -100], [5, eos, -100, -100, -100]]


def test_collate_without_a_tokenizer_pads_with_eos(script, bpe):
    """As in a plain DataLoader(dataset, collate_fn=collate_fn): no tokenizer has to be downloaded for the pad id."""
    batch = [(torch.zeros(3, 2, 2), ids, script._shift_labels(ids)) for ids in ([7, 5, 6, 7], [7, 7])]
    plain, given = script.collate_fn(batch), script.collate_fn(batch, SimpleNamespace(pad_token_id=7))
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))


def test_end_of_text_inside_a_caption_stays_a_target(script, bpe):
    """A mask that compared with the pad id would hide the middle of this caption."""
    eos = bpe.eos_token_id
    ids = [eos, 5, eos, 6, eos]
    labels = script.collate_fn([(torch.zeros(3, 2, 2), ids, script._shift_labels(ids))], bpe)[2]
    assert labels.tolist() == [[5, eos, 6, eos, -100]]


def test_collate_keeps_one_image_for_k_captions(script, bpe):
    a, b = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    batch = [(image, [1, 2], [2, 2]) for image in (a, a, b, b)]
    images, input_ids, _ = script.collate_fn(batch, bpe, captions_per_image=2)
    assert images[:, 0, 0, 0].tolist() == [0, 1]
    assert len(input_ids) == 4


def test_truncation_keeps_bos_and_eos(script, bpe):
    ids = script.encode_caption(bpe, "a red dog runs across the green grass .", max_length=5)
    assert len(ids) == 5
    assert (ids[0], ids[-1]) == (bpe.bos_token_id, bpe.eos_token_id)
    assert bpe.eos_token_id not in ids[1:-1]


def test_empty_caption(script, bpe):
    assert script.encode_caption(bpe, "", max_length=5) == [bpe.bos_token_id, bpe.eos_token_id]


@pytest.mark.parametrize("text", ["a red dog .", "größe 12 — «ok» 🐕", "tab\tand  spaces"])
def test_round_trip(bpe, text):
    assert bpe.decode([bpe.bos_token_id, *bpe.encode(text), bpe.eos_token_id]) == text


def test_spelled_out_special_token_is_text(bpe):
    for tokenizer in (bpe, pickle.loads(pickle.dumps(bpe))):  # pickled, as for a spawned worker
        ids = tokenizer.encode(f"a dog {END_OF_TEXT} runs")
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == f"a dog {END_OF_TEXT} runs"


def test_vocabulary_and_merges_folder(tmp_path, bpe):
    """GPT-2's own file names, without tokenizer.json."""
    bpe.backend.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    loaded = CaptionTokenizer(tmp_path)
    assert loaded.encode("a red dog") == bpe.encode("a red dog")
    assert loaded.eos_token_id == bpe.eos_token_id
    assert len(loaded) == len(bpe)


def test_missing_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, and no vocab\.json"):
        CaptionTokenizer(tmp_path).encode("x")
    with pytest.raises(FileNotFoundError, match=r"give a folder that holds vocab\.json and merges\.txt"):
        CaptionTokenizer("nobody/nothing").encode("x")


def test_module_tokenizer_is_read_on_first_use(script):
    """Importing the script must need neither network nor files."""
    assert script.tokenizer.source == script.HF_GPT2_REPO
    assert "backend" not in vars(script.tokenizer)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def words():
    return CaptionTokenizer.train(["a red dog runs .", "two red dogs run .", "a red dog"], vocab_size=9, kind="word")


def test_words_and_their_special_tokens(words, tmp_path):
    """Four special tokens, the commonest words, `<unk>` for others; also after a trip through tokenizer.json."""
    (tmp_path / "tokenizer.json").write_text(words.to_json())
    for tokenizer in (words, CaptionTokenizer(tmp_path), pickle.loads(pickle.dumps(words))):
        assert len(tokenizer) == 9
        assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<start>", "<end>", "<pad>"]
        ids = tokenizer.encode("a red zebra.")
        assert len(ids) == 4
        assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == "a red ."
        assert tokenizer.backend.id_to_token(ids[2]) == "<unk>"
        assert tokenizer.bos_token_id not in tokenizer.encode("<start> <end>")  # a caption cannot end itself


def test_words_keep_what_is_inside_of_them():
    text = "a man's t-shirt , 3 o'clock ."
    tokenizer = CaptionTokenizer.train([text], 50, "word")
    assert tokenizer.decode(tokenizer.encode("a man's t-shirt, 3 o'clock.")) == text


def test_masks_with_three_special_tokens(script, words):
    """Padding has its own id; labels are masked by length all the same."""
    image = torch.zeros(3, 2, 2)
    ids = [script.encode_caption(words, caption, 32) for caption in ("a red dog", "red")]
    batch = [(image, row, script._shift_labels(row)) for row in ids]
    _, input_ids, labels = script.collate_fn(batch, words)
    assert input_ids[1].tolist() == [*ids[1], words.pad_token_id, words.pad_token_id]
    assert labels[1].tolist() == [ids[1][1], words.eos_token_id, -100, -100, -100]
    assert labels[0, 3] == words.eos_token_id


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer 'char' is not one of gpt2, bpe, word"):
        CaptionTokenizer.train(["a"], 300, "char")


def test_padding_stored_in_a_foreign_file_is_forgotten(script, bpe, tmp_path):
    """transformers stores what its tokenizer was last asked for; pads inside captions would become targets."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(bpe.to_json())
    backend.enable_padding(length=16, pad_id=0)
    backend.enable_truncation(max_length=2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert CaptionTokenizer(tmp_path).encode("a red dog") == bpe.encode("a red dog")


# --- questions --------------------------------------------------------------------------------------------------------


def test_unknown_words_are_never_written(script, tiny_config):
    """A word list's <unk> is the likeliest token here, and no caption has it, however it is decoded."""
    tokenizer = CaptionTokenizer.train(CAPTIONS, 12, "word")
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")
    assert CaptionTokenizer.train(CAPTIONS, 300).unk_token_id == -1
    tiny_config.vocab_size, tiny_config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    model.gpt.final_norm.shift.data[:] = 1
    model.gpt.tok_emb.weight.data[tokenizer.unk_token_id] = 1
    images = torch.randn(4, 3, 32, 32)
    starts = torch.full((4, 1), tokenizer.bos_token_id)
    for options in (dict(deterministic=True), dict(num_beams=3), dict(seed=0)):
        model.config.unk_token_id = -1
        assert tokenizer.unk_token_id in generate_ids(model, images, starts, 10, **options)
        model.config.unk_token_id = tokenizer.unk_token_id
        assert tokenizer.unk_token_id not in generate_ids(model, images, starts, 10, **options)


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_a_prompt_is_context_and_never_loss(script, kind, monkeypatch):
    tokenizer = CaptionTokenizer.train(["what is red ? a dog"], 300, kind)
    df = pd.DataFrame({"image": ["1.jpg"], "caption": ["a dog"], "prompt": ["what is red ?"]})
    monkeypatch.setattr(unreadable_photos, "load_image", lambda path, least_side: torch.zeros(2, 2, 3))
    dataset = script.Dataset(df, lambda image, captions, seed: {"image": torch.tensor(image)}, tokenizer, max_length=64)
    _, ids, labels = dataset[0]
    prompt = script.encode_prompt(tokenizer, "what is red ?")
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids) == "what is red ? a dog"
    assert labels[: len(prompt) - 1] == [-100] * (len(prompt) - 1)
    assert tokenizer.decode(labels[len(prompt) - 1 : -1]).strip() == "a dog"
    assert labels[-2] == tokenizer.eos_token_id


def test_a_long_prompt_leaves_room_for_an_answer(script, bpe):
    ids = script.encode_caption(bpe, "yes", 8, "two young men stand on the left side of a house ?")
    assert len(ids) == 8
    assert ids[-1] == bpe.eos_token_id


# --- which tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_another_captioner_is_refused(script, tiny_model, bpe, tmp_path):
    """As many tokens, the same special ones, other words: captions would come out as fluent nonsense."""
    other = CaptionTokenizer.train([caption[::-1] for caption in CAPTIONS], len(bpe))
    assert len(other) == len(bpe) and other.eos_token_id == bpe.eos_token_id
    tiny_model.save_pretrained(tmp_path, bpe)
    assert script.load_captioner(tmp_path)[1].encode("a dog") == bpe.encode("a dog")
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    starting = SimpleNamespace(start_from=str(tmp_path))
    for load in (lambda: script.load_captioner(tmp_path), lambda: script.build_tokenizer(starting, [])):
        with pytest.raises(ValueError, match=r"its tokenizer\.json is not the one that the captioner was trained with"):
            load()
    (tmp_path / "tokenizer.json").write_text(bpe.to_json().replace("  ", ""))  # other bytes, the same words
    assert script.load_captioner(tmp_path)[1].fingerprint == bpe.fingerprint
    stored = (tmp_path / "config.json").read_text().replace("tokenizer_fingerprint", "_")
    (tmp_path / "config.json").write_text(stored)  # of an early version, which has none
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    script.load_captioner(tmp_path)


@pytest.mark.parametrize(
    ("constant", "value"),
    [("tokenizer", "word"), ("vocab_size", 77), ("depth", 3), ("activation", "relu"), ("encoder", "resnet18"),
     ("unk_token_id", 3), ("decoder_weights", "openai-community/gpt2"), ("encoder_weights", "weights.pth")],
)  # fmt: skip
def test_a_constant_that_the_captioner_to_start_from_decides_is_refused(
    script, tiny_model, bpe, tmp_path, constant, value
):
    tiny_model.save_pretrained(tmp_path / "m0", bpe)
    given = ["--start_from", str(tmp_path / "m0"), "--emb_dropout", "0.5"]
    stored = tiny_model.config
    model, *_ = script.read_configs([*given, f"--{constant}", str(getattr(stored, constant))])  # what it has anyway
    assert model.depth == stored.depth and model.emb_dropout == 0.5
    with pytest.raises(ValueError, match=f"^{constant} is {value!r}, but .*captioner in start_from, .*m0") as refused:
        script.read_configs([*given, f"--{constant}", str(value)])
    assert "\n" not in str(refused.value) and f"leave {constant} out" in str(refused.value)


def test_words_that_a_word_list_lacks_are_counted(script, tiny_config, tiny_train_config, flickr, words, capsys):
    df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
    capsys.readouterr()
    known = CaptionTokenizer.train(df["caption"], 500, "word")
    script.build_dataloaders(df, known, tiny_config, tiny_train_config)
    script.build_dataloaders(df, CaptionTokenizer.train(df["caption"], 300), tiny_config, tiny_train_config)
    assert "warning" not in capsys.readouterr().out
    german = df.assign(caption="ein roter hund rennt .")
    script.build_dataloaders(german, known, tiny_config, tiny_train_config)
    assert "warning: 80% of the words in the training captions are not in the tokenizer" in capsys.readouterr().out


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_cleaned_like_captions(script, tiny_model, bpe):
    """`A Small` is two words that the model has never seen; `a small` is what its captions begin with."""
    image, options = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), dict(max_tokens=5)
    plain = script.caption_images(tiny_model, bpe, [image], prompt="a red dog", **options)
    assert plain[0].startswith("a red dog")
    for prompt in ("A Red Dog", "  a  RED\tdog ", "a red \x07dog"):
        assert script.caption_images(tiny_model, bpe, [image], prompt=prompt, **options) == plain
        assert read_prompt(bpe, prompt, tiny_model.config) == ("a red dog", script.encode_prompt(bpe, "a red dog"), [])
    answer = script.caption_images(tiny_model, bpe, [image], prompt=["a red dog"], **options)
    assert script.caption_images(tiny_model, bpe, [image], prompt=["A  Red dog"], **options) == answer
    tiny_model.config.caption_case = "keep"
    assert script.caption_images(tiny_model, bpe, [image], prompt="A Red Dog", **options)[0].startswith("A Red Dog")


def test_a_prompt_does_not_vanish_where_a_word_list_lacks_its_words(script, tiny_config, capsys):
    tokenizer = CaptionTokenizer.train(CAPTIONS, 40, "word")
    tiny_config.vocab_size, tiny_config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    tiny_config.unk_token_id = tokenizer.unk_token_id
    model, image = script.VisionGPT2Model(tiny_config).eval(), torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    for _ in range(2):
        [caption] = script.caption_images(model, tokenizer, [image], prompt="A Zebra, a quagga", max_tokens=3)
        assert caption.startswith("a zebra, a quagga")
    warning = "captioner's word list lacks these words of the prompt, which it reads as <unk>: zebra, quagga"
    assert capsys.readouterr().err.count(warning) == 1  # once
    assert unknown_words(tokenizer, "a dog") == []
    [caption] = script.caption_images(model, tokenizer, [image], prompt="A Dog", max_tokens=3)
    assert caption.startswith("a dog") and capsys.readouterr().err == ""
    script.caption_images(model, tokenizer, [image] * 2, prompt=["is it a Gnu ?", "is it a dog ?"], max_tokens=3)
    assert "as <unk>: is, it, gnu" in capsys.readouterr().err


# --- languages without spaces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["一只狗在草地上奔跑。", "一只 iphone 手机", "สุนัขวิ่งบนหญ้า", "犬がスーパーで走る。", "a man's t-shirt , 3 dogs ."],
)
def test_characters_are_tokens_of_a_language_without_spaces(text, tmp_path):
    tokenizer = CaptionTokenizer.train([text], 200, "character")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = CaptionTokenizer(tmp_path)
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert [tokenizer.decode([i]) for i in ids] == split_characters(text)
    assert [word for word, _ in group_words(loaded, [loaded.bos_token_id, *ids])] == split_characters(text)
    assert len(ids) > 4 and loaded.has_characters
    assert not CaptionTokenizer.train([text], 300, "word").has_characters
    assert not CaptionTokenizer.train([text], 300).has_characters
