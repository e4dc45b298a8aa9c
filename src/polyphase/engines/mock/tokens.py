"""What a mock engine says: words that follow from the prompt and the position alone.

Neither seed, batch nor worker matters, so a request that migrates or is handed over goes on as if nothing had happened, and a test can say
beforehand what will come. An answer ends after a number of tokens that also follows from the prompt.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import xxhash

from polyphase.core.hashing import sequence_hashes
from polyphase.text import Tokenizer

_SHORTEST_ANSWER = 16  # tokens
_ANSWER_SPREAD = 384
_MAX_WORDS = 4096  # of a vocabulary; the first ones are the frequent ones


class MockTokens:
    """`word_ids` are what answers consist of; `eos_id` ends them, None: only lengths do."""

    def __init__(self, word_ids: Sequence[int], eos_id: int | None) -> None:
        self._word_ids = tuple(word_ids)
        self._eos_id = eos_id

    def token(self, prompt_key: int, position: int, *, may_end: bool) -> int:
        """Output token number `position` of the answer to the prompt with this key."""
        if may_end and self._eos_id is not None and position >= answer_length(prompt_key):
            return self._eos_id
        return self._word_ids[xxhash.xxh3_64_intdigest(struct.pack("<QQ", prompt_key, position)) % len(self._word_ids)]

    def answer(self, prompt: Sequence[int], count: int, block_size: int) -> list[int]:
        """The first `count` tokens of the answer to `prompt`, the end of sequence left out of account."""
        hashes = sequence_hashes(prompt, block_size)
        key = prompt_key(hashes[-1] if hashes else 0, prompt[len(hashes) * block_size :])
        return [self.token(key, position, may_end=False) for position in range(count)]


def prompt_key(last_hash: int, rest: Sequence[int]) -> int:
    """A number for a whole prompt: from the sequence hash of its last full block (0: none) and the tokens behind that."""
    return int(xxhash.xxh3_64_intdigest(array("I", rest).tobytes(), last_hash))


def answer_length(key: int) -> int:
    """Tokens before the end of sequence."""
    return _SHORTEST_ANSWER + key % _ANSWER_SPREAD


def speakable_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that begin a word, in plain letters; any ordinary ones if there are none."""
    ordinary: list[int] = []
    words: list[int] = []
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.is_special(token_id):
            continue
        ordinary.append(token_id)
        text = (tokenizer.token_bytes(token_id) or b"").decode("utf-8", "replace")
        if text.startswith(" ") and text.isascii() and text[1:].isalpha():
            words.append(token_id)
            if len(words) == _MAX_WORDS:
                break
    return words or ordinary[:_MAX_WORDS] or [0]
