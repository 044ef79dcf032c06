"""How long a caption may be, in words and characters, and where a caption that would get longer ends instead.

A search chooses tokens as ever. Tokens that do not fit are out of the question, and where the likeliest next token does
not fit, the caption can only end: what comes second there is not what the model wanted to say. An end that a limit has
forced may lie inside a word or behind an article. `LengthLimits.shorten` then takes, of the ends that do not, the one
that beam search would score best.

Words are what spaces separate; the words that no caption ends with are English.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
import torch

from captioning.decoding.cached_decoder import next_token_logits
from captioning.model.tokenizer import CHARACTER_SCRIPTS

ENDS_OF_WORDS = tuple(".,;:!?")  # a token that begins with one of them does not go on with the word before
# Articles, prepositions, conjunctions and the like: behind them something must follow.
DANGLING = """
a an the this that these those his her its their my your our some each every
of on in at by for from to into onto with without near behind beside between under over above below beneath through
across along against around toward towards during beyond inside outside underneath upon per via off up
and or but nor while as than because if when where which who whose is are was were be being been has have very
"""
DANGLING_WORDS = frozenset(DANGLING.split())
_unspaced = re.compile(CHARACTER_SCRIPTS)  # behind such a character a word may end without a space


class LengthLimits:
    """The limits of a search: at least `min_tokens` new tokens in front of EOS, at most `max_words` words and
    `max_chars` characters behind the prompt (0: any number).

    As a logits processor, `limits(ids (rows, T), logits (rows, vocab_size))`, it never waits for the device.
    """

    def __init__(self, options, tokenizer, prompt_length, eos, vocab_size, device):
        """`options`: a `search.Options`; `tokenizer`: the captioner's, which limits in words or characters need. Raises
        ValueError where it is missing."""
        self.options, self.prompt_length, self.eos = options, prompt_length, eos
        self.is_eos = torch.arange(vocab_size, device=device) == eos  # (vocab_size,)
        self.of_text = bool(options.max_words or options.max_chars)
        if self.of_text:
            if tokenizer is None:
                raise ValueError("max_words and max_chars need the captioner's tokenizer: give tokenizer=...")
            self.texts = tokenizer.token_bytes
            counts = torch.tensor(_counts(tokenizer, vocab_size)).to(device)
            self.chars, self.spaces = counts  # (vocab_size,) each

    def __call__(self, ids, logits):
        new, given = ids[:, self.prompt_length :], logits  # (rows, new)
        if new.size(1) < self.options.min_tokens:
            logits = logits.masked_fill(self.is_eos, -torch.inf)
        if not self.of_text:
            return logits
        too_long = self._too_long(new)  # (rows, vocab_size)
        must_end = too_long.gather(1, logits.argmax(1, keepdim=True))  # (rows, 1)
        only_end = given.masked_fill(~self.is_eos, -torch.inf)
        return torch.where(must_end, only_end, logits.masked_fill(too_long, -torch.inf))

    def _too_long(self, new):
        """Tokens behind the prompt (rows, new) -> for each token whether it would exceed a limit (rows, vocab_size)."""
        stripped = self.spaces[new[:, :1]] if new.size(1) else self.spaces  # the space in front of the first word
        chars = self.chars[new].sum(1, keepdim=True) + self.chars - stripped  # (rows, vocab_size)
        words = self.spaces[new].sum(1, keepdim=True) + self.spaces + 1 - stripped
        too_long = torch.zeros_like(chars, dtype=torch.bool)
        if self.options.max_chars:
            too_long |= chars > self.options.max_chars
        if self.options.max_words:
            too_long |= words > self.options.max_words
        return too_long

    def shorten(self, model, states, ids, max_logits):
        """Captions (rows, T) of `generate_ids` -> the same, but those whose end a limit has forced end where they may.

        `states`: those of `model.encoder_states`; `max_logits`: how many are in memory at a time.
        """
        if not self.of_text:
            return ids
        hidden = model.decode(ids, states)[:, self.prompt_length - 1 :]  # (rows, new + 1, embed_dim)
        targets, found = ids[:, self.prompt_length :], []
        rows = max(1, max_logits // (hidden.size(1) * model.config.vocab_size))
        for part, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            log_probs = next_token_logits(model, part).log_softmax(-1)  # (rows, new + 1, vocab_size)
            of_tokens = log_probs[:, :-1].gather(2, tokens[..., None])[..., 0]  # (rows, new)
            of_eos = log_probs[..., self.eos]  # (rows, new + 1)
            columns = tokens, log_probs.argmax(-1), of_tokens, of_eos
            found += zip(*(column.tolist() for column in columns), strict=True)
        lengths = [self._best_length(*row) for row in found]
        ends = torch.tensor(lengths).to(ids.device)[:, None]  # (rows, 1)
        behind = torch.arange(targets.size(1), device=ids.device) >= ends  # (rows, new)
        return torch.cat([ids[:, : self.prompt_length], targets.masked_fill(behind, self.eos)], dim=1)

    def _best_length(self, tokens, likeliest, log_probs, of_eos):
        """How many of the `tokens` (new,) of a caption stay. `log_probs` (new,): theirs; `likeliest` and `of_eos`
        (new + 1,): the likeliest token and EOS's log-probability behind so many of them."""
        length = tokens.index(self.eos) if self.eos in tokens else len(tokens)
        if likeliest[length] == self.eos:
            return length  # nothing has forced this end
        following = [*tokens[:length], likeliest[length]]
        good = [n for n in range(1, length + 1) if self._may_end(tokens[:n], following[n])]
        if length in good and length < len(tokens) and self._fits(following):
            return length  # a draw or a beam, which ended before the limit

        def score(n):
            return (sum(log_probs[:n]) + of_eos[n]) / (n + 1) ** self.options.length_penalty

        return max([n for n in good if n >= self.options.min_tokens] or good, key=score, default=0)

    def _text(self, tokens):
        return b"".join(self.texts[token] for token in tokens).decode("utf-8", "replace").strip()

    def _fits(self, tokens):
        text, options = self._text(tokens), self.options
        return (len(text) <= options.max_chars or not options.max_chars) and (
            len(text.split()) <= options.max_words or not options.max_words
        )

    def _may_end(self, tokens, following):
        """Whether a caption may end behind these tokens, where the token `following` would follow."""
        text, rest = self._text(tokens), self.texts[following].decode("utf-8", "replace")
        if not text or not (text[-1].isalnum() or text[-1] in ".!?\"')" or _unspaced.match(text[-1])):
            return False  # behind a comma, or between the bytes of a character
        last_word = text.split()[-1].strip("\"'(").lower()
        between = not rest or rest[0].isspace() or rest[0] in ENDS_OF_WORDS
        mark = bool(rest) and unicodedata.category(rest[0]).startswith("M")  # belongs to the letter before
        may_end = between or (_unspaced.match(text[-1]) is not None and not mark)
        return may_end and last_word not in DANGLING_WORDS


@lru_cache(maxsize=4)
def _counts(tokenizer, vocab_size):
    """-> integers (2, vocab_size): the characters of each token's text, and whether it begins with a space."""
    texts = (tokenizer.token_bytes + [b""] * vocab_size)[:vocab_size]
    chars = [sum(byte >> 6 != 0b10 for byte in text) for text in texts]  # the other bytes of UTF-8 continue one
    return np.array([chars, [text[:1].isspace() for text in texts]])
