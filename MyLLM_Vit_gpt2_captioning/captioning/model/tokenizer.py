"""Text to token ids and back: GPT-2's byte-level BPE, or a BPE or a word vocabulary trained on your own captions.

A BPE has one special token, `<|endoftext|>`, which is BOS, EOS and padding, as in GPT-2. A word vocabulary has
`<start>`, `<end>` and `<pad>`, and `<unk>` for a word that it lacks. Both have the same interface, with the attribute
names of Hugging Face tokenizers, but only the light `tokenizers` library is imported.
"""

import json
import os
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from captioning.common.files import TOKENIZER_FILE
from captioning.common.printable import printable

# Data workers are forked after the tokenizer was used; without this setting the library warns in each of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
WORDS = r"\w+(?:[-']\w+)*|[^\w\s]"  # with inner apostrophes and hyphens ("man's", "t-shirt"); single punctuation marks
# GPT-2's, which some programs write out in place of the name ByteLevel.
KNOWN_PATTERNS = {WORDS, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
START, END, PAD, UNKNOWN = "<start>", "<end>", "<pad>", "<unk>"


def _byte_level(model):
    """A `tokenizers.Tokenizer` that splits text into bytes as GPT-2 does, so that no character is unknown."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@contextmanager
def _named(path):
    """Around calls of the library with what is in a file: whatever fails is a ValueError that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises bare Exception; its panics are not even that
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__))[:300]
        raise ValueError(f"{path}: damaged, or not a tokenizer ({reason}); take the file from a backup") from error


def _load_file(path):
    """tokenizer.json -> a `tokenizers.Tokenizer`. Raises ValueError that names a file that is damaged or has regular
    expressions of its own."""
    with _named(path):
        backend = Tokenizer.from_file(str(path))
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
        patterns = [p for part in parts if part is not None for p in _patterns(json.loads(part.__getstate__()))]
    for pattern in patterns:
        if pattern not in KNOWN_PATTERNS:
            raise ValueError(
                f"{path}: has the regular expression {pattern[:60]!r}, which is neither GPT-2's nor this project's and "
                "may take for ever on a caption: take a tokenizer without it"
            )
    with _named(path):
        _check_vocabulary(backend)
        # One that encodes nothing, such as a vocabulary without a token for unknown words, is found now.
        backend.decode(backend.encode("a\u0301 \U0001f600, 1").ids)
    return backend


def _check_vocabulary(backend):
    """Raise ValueError where the ids of a tokenizer's n tokens are not 0 to n - 1: with an id of a thousand million the
    library would ask for as much memory, and the model has no row for it."""
    size = backend.get_vocab_size()
    missing = next((i for i in range(size) if backend.id_to_token(i) is None), None)
    if missing is not None:
        raise ValueError(f"{size:,} tokens, but none has the id {missing}")


def _patterns(part):
    """Yields the regular expressions in a part of tokenizer.json. A hostile one can take for ever on a caption."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key == "Regex":
            yield str(value)
        yield from _patterns(value)


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
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
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
            backend = _load_file(folder / TOKENIZER_FILE)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            with _named(folder / "vocab.json"):
                backend = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
                backend.add_special_tokens([END_OF_TEXT])
                _check_vocabulary(backend)
        elif folder.is_dir():
            raise FileNotFoundError(f"{folder}: no {TOKENIZER_FILE}, and no vocab.json with merges.txt")
        else:
            from huggingface_hub import hf_hub_download

            from captioning.common.hub_errors import explain

            try:
                path = hf_hub_download(self.source, TOKENIZER_FILE)
            except Exception as error:  # huggingface_hub, its HTTP library and Xet raise classes of their own
                raise FileNotFoundError(
                    f"the tokenizer {self.source!r} is not a local folder, and the Hugging Face hub did not give it: "
                    f"{explain(error)}; or give a folder that holds vocab.json and merges.txt"
                ) from error
            backend = _load_file(path)
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
