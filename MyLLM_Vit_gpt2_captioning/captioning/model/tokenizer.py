"""Text to token ids and back: GPT-2's byte-level BPE, or a BPE or a word vocabulary trained on your own captions.

A BPE has one special token, `<|endoftext|>`, which is BOS, EOS and padding, as in GPT-2. A word vocabulary has
`<start>`, `<end>` and `<pad>`, and `<unk>` for a word that it lacks. Both have the same interface, with the attribute
names of Hugging Face tokenizers, but only the light `tokenizers` library is imported.
"""

import os
from functools import cached_property
from pathlib import Path

from captioning.common.files import TOKENIZER_FILE

# Data workers are forked after the tokenizer was used; without this setting the library warns in each of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START, END, PAD, UNKNOWN = "<start>", "<end>", "<pad>", "<unk>"


def _byte_level(model):
    """A `tokenizers.Tokenizer` that splits text into bytes as GPT-2 does, so that no character is unknown."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _load_file(path, load):
    """load(path), with a ValueError that names the file if that fails."""
    try:
        return load(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: damaged, or not a tokenizer ({error}); take the file from a backup") from error


class CaptionTokenizer:
    """`encode(text)` -> ids without special tokens; `decode(ids)` -> text without special tokens.

    `source` is a folder with `tokenizer.json` or with `vocab.json` and `merges.txt`, or a Hugging Face hub id. It is
    read on first use, so that constructing the object needs neither files nor network.
    """

    def __init__(self, source, backend=None):
        self.source = str(source)
        if backend is not None:
            self.backend = backend

    @classmethod
    def train(cls, captions, vocab_size, kind="bpe"):
        """Train a tokenizer on captions, with at most `vocab_size` tokens, the special ones included.

        "bpe": byte-level like GPT-2's, the 256 bytes and the commonest merges. "word": the commonest words and
        punctuation marks. Raises ValueError for another kind.
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
            # Words with inner apostrophes and hyphens ("man's", "t-shirt"), and single punctuation marks.
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
        """The underlying `tokenizers.Tokenizer`.

        Raises FileNotFoundError that says where to get a missing file, ValueError that names a damaged one.
        """
        folder = Path(self.source)
        if (folder / TOKENIZER_FILE).is_file():
            backend = _load_file(folder / TOKENIZER_FILE, Tokenizer.from_file)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges = str(folder / "merges.txt")
            backend = _byte_level(_load_file(folder / "vocab.json", lambda vocab: models.BPE.from_file(vocab, merges)))
            backend.add_special_tokens([END_OF_TEXT])
        elif folder.is_dir():
            raise FileNotFoundError(f"{folder}: no {TOKENIZER_FILE}, and no vocab.json with merges.txt")
        else:
            from huggingface_hub import hf_hub_download

            from captioning.common.hub_errors import explain

            try:
                backend = Tokenizer.from_file(hf_hub_download(self.source, TOKENIZER_FILE))
            except Exception as error:  # huggingface_hub, its HTTP library and Xet raise classes of their own
                raise FileNotFoundError(
                    f"the tokenizer {self.source!r} is not a local folder, and the Hugging Face hub did not give it: "
                    f"{explain(error)}; or give a folder that holds vocab.json and merges.txt"
                ) from error
        backend.no_padding()  # transformers stores the padding and truncation of the last call in tokenizer.json
        backend.no_truncation()
        special = {token for token in (END_OF_TEXT, START, END, PAD) if backend.token_to_id(token) is not None}
        if END_OF_TEXT not in special and not {START, END, PAD} <= special:
            raise ValueError(f"{self.source}: the tokenizer has neither {END_OF_TEXT} nor {START}, {END} and {PAD}")
        return backend

    def encode(self, text):
        """text -> list of ids, without special tokens."""
        # The text "<|endoftext|>" in a caption is encoded as text, not as EOS. Set on every call, because pickling (for
        # a spawned worker) loses the setting.
        self.backend.encode_special_tokens = True
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids, skip_special_tokens=True):
        """Ids (list, array or 1-D tensor) -> text; bytes that are not valid UTF-8 become the replacement character."""
        return self.backend.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)

    @cached_property
    def token_bytes(self):
        """What each id adds to a text, a list of bytes: nothing for special tokens; a word list's words have the space
        in front that `decode` puts between them."""
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        special |= {self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id}
        tokens = [self.backend.id_to_token(i) or "" for i in range(len(self))]
        if self.backend.decoder is None:
            texts = [f" {token}".encode() for token in tokens]
        else:  # a byte is a character; those that cannot be printed are the ones from 256 on, as in GPT-2
            printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
            byte_of = {chr(byte): byte for byte in printable}
            byte_of |= {chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*printable}))}
            texts = [bytes(byte_of.get(character, 0) for character in token) for token in tokens]
        return [b"" if i in special else text for i, text in enumerate(texts)]

    def to_json(self):
        """The tokenizer as text: the content of `tokenizer.json`."""
        return self.backend.to_str(pretty=True)

    def __len__(self):
        return self.backend.get_vocab_size()

    def _special_id(self, word_token):
        """The id of `<|endoftext|>` if the vocabulary has it, else that of `word_token`."""
        end_of_text = self.backend.token_to_id(END_OF_TEXT)
        return self.backend.token_to_id(word_token) if end_of_text is None else end_of_text

    @property
    def bos_token_id(self):
        return self._special_id(START)

    @property
    def eos_token_id(self):
        return self._special_id(END)

    @property
    def pad_token_id(self):
        return self._special_id(PAD)

    @property
    def unk_token_id(self):
        """The id of words that a word vocabulary lacks; -1 for a BPE, which has no such id."""
        unknown = self.backend.token_to_id(UNKNOWN)
        return -1 if unknown is None or self.backend.token_to_id(END_OF_TEXT) is not None else unknown

    @property
    def bos_token(self):
        return self.backend.id_to_token(self.bos_token_id)

    @property
    def eos_token(self):
        return self.backend.id_to_token(self.eos_token_id)

    @property
    def pad_token(self):
        return self.backend.id_to_token(self.pad_token_id)


def encode_caption(tokenizer, caption, max_length, prompt=""):
    """caption -> list of ids [BOS] caption [EOS] of at most `max_length`; truncation drops words, never EOS.

    With a prompt (a question) the ids are [BOS] prompt caption [EOS].
    """
    ids = encode_prompt(tokenizer, prompt)[: max(1, max_length - 2)]
    caption_ids = tokenizer.encode(f" {caption}" if prompt else caption)
    return [*ids, *caption_ids[: max_length - 1 - len(ids)], tokenizer.eos_token_id]


def encode_prompt(tokenizer, prompt):
    """prompt -> list of ids [BOS] prompt, which generation continues."""
    return [tokenizer.bos_token_id, *tokenizer.encode(prompt.strip())]


def check_eos(tokenizer, config):
    """Raise ValueError when the EOS id of a trained captioner's `config` is not that of its tokenizer."""
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"{tokenizer.source}: the tokenizer ends captions with id {tokenizer.eos_token_id}, the captioner with "
            f"{config.eos_token_id}: they do not belong together"
        )
