"""Text to token ids and back: GPT-2's byte-level BPE, or a BPE or a word vocabulary trained on your own captions.

A BPE has one special token, `<|endoftext|>`, which is BOS, EOS and padding, as in GPT-2. A word vocabulary has
`<start>`, `<end>` and `<pad>`, and `<unk>` for a word that it lacks. Both have the same interface, with the attribute
names of Hugging Face tokenizers, but only the light `tokenizers` library is imported.
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from captioning.common.files import CONFIG_FILE, TOKENIZER_FILE
from captioning.common.printable import printable
from captioning.common.text import clean_text

# Data workers are forked after the tokenizer was used; without this setting the library warns in each of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Letters of scripts that are written without spaces between words, as ranges that every library of regular expressions
# knows: Thai, Lao, Myanmar, Khmer, Hiragana and Katakana, Han.
CHARACTER_SCRIPTS = (
    "[\u0e01-\u0e4e\u0e80-\u0ece\u1000-\u103f\u1050-\u109f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f]"
)
# Words with inner apostrophes and hyphens ("man's", "t-shirt"), and single punctuation marks.
WORDS = r"\w+(?:[-']\w+)*|[^\w\s]"
# Each letter of such a script, with its marks and lengthening, and words of other scripts.
CHARACTERS = (
    rf"(?:(?=\w){CHARACTER_SCRIPTS})[\p{{M}}\u30fc\uff70]*"
    rf"|(?:(?!{CHARACTER_SCRIPTS})\w)+(?:[-'](?:(?!{CHARACTER_SCRIPTS})\w)+)*|[^\w\s]"
)
# GPT-2's, which some programs write out in place of the name ByteLevel.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = {WORDS, CHARACTERS, GPT2_PATTERN}
START, END, PAD, UNKNOWN = "<start>", "<end>", "<pad>", "<unk>"


def _byte_level(model):
    """A `tokenizers.Tokenizer` that splits text into bytes as GPT-2 does, so that no character is unknown."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(pattern):
    """A pre-tokenizer that gives the matches of a regular expression."""
    return pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)


_characters = _split(CHARACTERS)
# A space between two tokens that are such letters, or the punctuation of such scripts.
_SPACELESS = CHARACTER_SCRIPTS[:-1] + "\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]"
SPACE_BESIDE_CHARACTER = re.compile(rf"(?<={_SPACELESS}) (?={_SPACELESS})")


def split_characters(text):
    """A text -> its tokens as the tokenizer "character" splits it, list of str."""
    return [token for token, _ in _characters.pre_tokenize_str(text)]


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
        punctuation marks. "character": in place of words the letters of languages that are written without spaces.
        Raises ValueError for another kind.
        """
        if kind == "bpe":
            backend = _byte_level(models.BPE())
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END_OF_TEXT],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            )
        elif kind in ("word", "character"):
            backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            backend.pre_tokenizer = _split(WORDS if kind == "word" else CHARACTERS)
            trainer = trainers.WordLevelTrainer(
                vocab_size=vocab_size, special_tokens=[PAD, START, END, UNKNOWN], show_progress=False
            )
        else:
            raise ValueError(f"tokenizer {kind!r} is not one of gpt2, bpe, word, character")
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
        text = self.backend.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)
        return SPACE_BESIDE_CHARACTER.sub("", text) if self.has_characters else text

    @cached_property
    def has_characters(self):
        """Whether letters of scripts without spaces are tokens: those of `train` with the kind "character"."""
        splitter = self.backend.pre_tokenizer
        return splitter is not None and len(splitter.pre_tokenize_str("\u4e00\u4e8c")) == 2

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

    @cached_property
    def fingerprint(self):
        """A hash of the vocabulary: tokens and their ids."""
        vocabulary = self.backend.get_vocab()
        text = json.dumps(sorted(vocabulary, key=vocabulary.get))
        return hashlib.sha256(text.encode()).hexdigest()

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


class Prompt(NamedTuple):
    """What captions begin with, or a question, as the model reads it."""

    text: str  # cleaned like the captions that the model was trained on
    ids: list[int]  # [BOS] prompt, cut off so that the model can go on
    unknown: list[str]  # its words that a word list lacks; the model reads them as <unk>

    def caption(self, tokenizer, ids):
        """Ids of a caption that begins with this prompt -> its text, in which the words that a word list lacks stand,
        too."""
        if not self.unknown:
            return tokenizer.decode(ids[1:]).strip()
        return f"{self.text} {tokenizer.decode(ids[len(self.ids) :]).strip()}".strip()

    def warning(self):
        """What to say of the words that the model cannot read; empty where it can read all."""
        if not self.unknown:
            return ""
        words = printable(", ".join(self.unknown))
        return f"the captioner's word list lacks these words of the prompt, which it reads as <unk>: {words}"


def read_prompt(tokenizer, text, config):
    """A text as a user gives it -> the `Prompt` of a captioner with this model_config."""
    text = clean_text(text, config.caption_case)
    ids = encode_prompt(tokenizer, text)[: config.seq_len - 2]  # the same truncation as in training
    return Prompt(text, ids, unknown_words(tokenizer, text))


def unknown_words(tokenizer, text):
    """The words of a text that are not in a word list, each once; none for a BPE."""
    if not isinstance(tokenizer, CaptionTokenizer) or tokenizer.unk_token_id < 0:
        return []
    unknown = tokenizer.unk_token_id
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    places = [place for number, place in zip(encoded.ids, encoded.offsets, strict=True) if number == unknown]
    words = dict.fromkeys(text[start:end] for start, end in places)
    return [word for word in words if any(map(str.isalnum, word))]


def check_fingerprint(tokenizer, stored):
    """Raise ValueError when a captioner was trained with another tokenizer, by the content of its config.json,
    `stored`: its ids would be other words. Captioners of Hugging Face, and early ones of ours, do not say which."""
    expected = stored.get("tokenizer_fingerprint")
    if expected and tokenizer.fingerprint != expected:
        raise ValueError(
            f"{tokenizer.source}: its {TOKENIZER_FILE} is not the one that the captioner was trained with, by the "
            f"fingerprint in {CONFIG_FILE}; take both files from one run"
        )


def check_eos(tokenizer, config):
    """Raise ValueError when the EOS id of a trained captioner's `config` is not that of its tokenizer."""
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"{tokenizer.source}: the tokenizer ends captions with id {tokenizer.eos_token_id}, the captioner with "
            f"{config.eos_token_id}: they do not belong together"
        )
