"""Token ids of a long text, tokenized in pieces, since a tokenizer takes hundreds of bytes for each token meanwhile."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zssvd_lightning._resources import trim_heap

PIECE = 2**17
"""Characters of a piece, at least."""

AROUND = 2**11
"""Characters before and after a cut, by which it is checked."""

TRIES = 4
"""Places that are tried for one cut, and cuts that fail before the rest is tokenized at once."""

_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, piece: int = PIECE) -> Tensor:
    """Return the ids (T,) of a text without special tokens, which are those of the text as a whole.

    A text is cut between words, and only where the tokens of what is around the cut, `AROUND` characters to each side,
    are those of the two sides apart. This is so at most spaces for tokenizers that split a text into words first. Where
    no such place is found, as for those that begin every text with a space, the rest of the text is tokenized at once.

    Args:
        text: the text.
        tokenizer: tokenizer whose tokens depend on no more than `AROUND` characters to each side.
        piece: characters of a piece, at least.
    """
    found = [torch.tensor(_ids(part, tokenizer), dtype=torch.long) for part in _pieces(text, tokenizer, piece)]
    trim_heap()
    return torch.cat(found)


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, piece: int) -> Iterator[str]:
    """Yield parts of a text whose tokens together are those of the text."""
    start, failed = 0, 0
    while failed < TRIES and start + (failed + 1) * piece + AROUND < len(text):
        cut = _cut(text, start + (failed + 1) * piece, tokenizer)
        failed = failed + 1 if cut is None else 0
        if cut is not None:
            yield text[start:cut]
            start = cut
    yield text[start:]


def _cut(text: str, first: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return a place at or after `first` where a text can be cut; None if none of the next is known to be one."""
    for _, found in zip(range(TRIES), _BETWEEN_WORDS.finditer(text, first, first + AROUND), strict=False):
        cut = found.start()
        before, after = text[max(0, cut - AROUND) : cut], text[cut : cut + AROUND]
        if _ids(before + after, tokenizer) == _ids(before, tokenizer) + _ids(after, tokenizer):
            return cut
    return None


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    return ids
