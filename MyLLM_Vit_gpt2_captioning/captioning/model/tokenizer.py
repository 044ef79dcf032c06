"""Text to token ids and back: GPT-2's byte-level BPE, or a BPE or a list of words learnt from your own captions.

A BPE has one special token, `<|endoftext|>`, that begins a caption, ends it and pads it, as in GPT-2; words have
`<start>`, `<end>` and `<pad>`, and `<unk>` for a word that is not in the list. Nothing else has to know which it is.
The attribute names are those of Hugging Face tokenizers, but only the light `tokenizers` library is imported.
"""

import os
from functools import cached_property
from pathlib import Path

from captioning.common.files import TOKENIZER_FILE

# Data workers are forked after the tokenizer was used; without this the library warns in each of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START, END, PAD, UNKNOWN = "<start>", "<end>", "<pad>", "<unk>"


def _byte_level(model):
    """A `tokenizers.Tokenizer` that splits like GPT-2 and leaves no character unknown."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read(path, read):
    try:
        return read(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path}: damaged, or not a tokenizer ({error}); take the file from a backup") from error


class CaptionTokenizer:
    """`encode(text)` -> ids without special tokens; `decode(ids)` -> text without special tokens.

    `source` is a folder with `tokenizer.json` or with `vocab.json` and `merges.txt`, or a Hugging Face hub id.
    It is read on first use, so that making the object needs neither files nor network.
    """

    def __init__(self, source, backend=None):
        self.source = str(source)
        if backend is not None:
            self.backend = backend

    @classmethod
    def train(cls, captions, vocab_size, kind="bpe"):
        """Learn from captions at most `vocab_size` tokens, special ones included.

        "bpe": byte-level, as GPT-2's: 256 bytes, then the commonest merges. "word": the commonest words and marks of
        punctuation. Raises ValueError for another kind.
        """
        if kind == "bpe":
            backend = _byte_level(models.BPE())
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END_OF_TEXT],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            )
        elif kind == "word":
            backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            # Words with what is inside of them ("man's", "t-shirt"), and marks of punctuation by themselves.
            words = Regex(r"\w+(?:[-']\w+)*|[^\w\s]")
            backend.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
            trainer = trainers.WordLevelTrainer(
                vocab_size=vocab_size, special_tokens=[PAD, START, END, UNKNOWN], show_progress=False
            )
        else:
            raise ValueError(f"tokenizer {kind!r} is not one of gpt2, bpe, word")
        backend.train_from_iterator(captions, trainer)
        return cls("trained on captions", backend)

    @cached_property
    def backend(self):
        """The underlying `tokenizers.Tokenizer`. Raises FileNotFoundError that says where to get a missing one,
        ValueError that names a damaged file."""
        folder = Path(self.source)
        if (folder / TOKENIZER_FILE).is_file():
            backend = _read(folder / TOKENIZER_FILE, Tokenizer.from_file)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges = str(folder / "merges.txt")
            backend = _byte_level(_read(folder / "vocab.json", lambda vocab: models.BPE.from_file(vocab, merges)))
            backend.add_special_tokens([END_OF_TEXT])
        elif folder.is_dir():
            raise FileNotFoundError(f"{folder}: no {TOKENIZER_FILE}, and no vocab.json with merges.txt")
        else:
            from huggingface_hub import hf_hub_download

            from captioning.common.hub_errors import explain

            try:
                backend = Tokenizer.from_file(hf_hub_download(self.source, TOKENIZER_FILE))
            except Exception as error:  # of huggingface_hub, its HTTP library or Xet: each has its own
                raise FileNotFoundError(
                    f"the tokenizer {self.source!r} is neither a local folder nor to be had from the Hugging Face hub: "
                    f"{explain(error)}; or give a folder that holds vocab.json and merges.txt"
                ) from error
        backend.no_padding()  # transformers stores what a call asked for last; here every caption keeps its own length
        backend.no_truncation()
        has = {token for token in (END_OF_TEXT, START, END, PAD) if backend.token_to_id(token) is not None}
        if END_OF_TEXT not in has and not {START, END, PAD} <= has:
            raise ValueError(f"{self.source}: the tokenizer has neither {END_OF_TEXT} nor {START}, {END} and {PAD}")
        return backend

    def encode(self, text):
        """text -> list of ids, without special tokens."""
        # A caption that spells out <|endoftext|> does not end there. Set on every call: pickling, as for a spawned
        # worker, forgets it.
        self.backend.encode_special_tokens = True
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids, skip_special_tokens=True):
        """Ids (list, array or 1-D tensor) -> text; bytes that are no valid UTF-8 become the replacement character."""
        return self.backend.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)

    def to_json(self):
        """The text of `tokenizer.json`, from which the tokenizer can be made again."""
        return self.backend.to_str(pretty=True)

    def __len__(self):
        return self.backend.get_vocab_size()

    def _special(self, name):
        """The id of a special token of ours; `<|endoftext|>` plays all three roles where it is there."""
        end_of_text = self.backend.token_to_id(END_OF_TEXT)
        return self.backend.token_to_id(name) if end_of_text is None else end_of_text

    bos_token_id = property(lambda self: self._special(START))
    eos_token_id = property(lambda self: self._special(END))
    pad_token_id = property(lambda self: self._special(PAD))

    @property
    def unk_token_id(self):
        """The id of words that a word list lacks, -1 where there is no such id."""
        unknown = self.backend.token_to_id(UNKNOWN)
        return -1 if unknown is None or self.backend.token_to_id(END_OF_TEXT) is not None else unknown

    bos_token = property(lambda self: self.backend.id_to_token(self.bos_token_id))
    eos_token = property(lambda self: self.backend.id_to_token(self.eos_token_id))
    pad_token = property(lambda self: self.backend.id_to_token(self.pad_token_id))


def encode_caption(tokenizer, caption, max_length, prompt=""):
    """caption -> ids [BOS] caption [EOS], at most `max_length` of them; a longer caption loses words, never EOS.

    With a prompt (a question) the ids are [BOS] prompt caption [EOS].
    """
    ids = encode_prompt(tokenizer, prompt)[: max(1, max_length - 2)]
    caption_ids = tokenizer.encode(f" {caption}" if prompt else caption)
    return [*ids, *caption_ids[: max_length - 1 - len(ids)], tokenizer.eos_token_id]


def encode_prompt(tokenizer, prompt):
    """prompt -> ids [BOS] prompt: what the model is given before it writes."""
    return [tokenizer.bos_token_id, *tokenizer.encode(prompt.strip())]


def check_eos(tokenizer, config):
    """Raise ValueError when a trained captioner ends its captions with another id than its tokenizer."""
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"{tokenizer.source}: the tokenizer ends captions with id {tokenizer.eos_token_id}, the captioner with "
            f"{config.eos_token_id}: they do not belong together"
        )
