"""Names of the full blocks of one growing sequence of tokens: content keys for re-use, sequence hashes for the events.

They follow from the tokens; a simulation that has no tokens gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyphase.core.hashing import next_content_key, root_key, sequence_hashes
from polyphase.core.ids import ContentKey, SequenceHash


class BlockNames(Protocol):
    """In the order of the blocks; there may be more of them than full blocks."""

    @property
    def keys(self) -> Sequence[ContentKey]: ...

    @property
    def hashes(self) -> Sequence[SequenceHash]: ...

    def extend(self, token_ids: Sequence[int]) -> None:
        """Afterwards every full block of `token_ids`, the whole sequence, has its names."""


class GivenNames:
    """Of all blocks that a sequence will ever fill, known before its tokens are. Owner: the lists may be shared, nobody changes them."""

    __slots__ = ("hashes", "keys")

    def __init__(self, keys: Sequence[ContentKey], hashes: Sequence[SequenceHash]) -> None:
        self.keys = keys
        self.hashes = hashes

    def extend(self, token_ids: Sequence[int]) -> None:
        """All names are there."""


class PrefixChain:
    """Keys and hashes computed so far; `extend` adds those of blocks that have become full."""

    __slots__ = ("_block_size", "_root", "_salt", "hashes", "keys")

    def __init__(self, block_size: int, namespace: str, salt: str | None) -> None:
        self._block_size = block_size
        self._salt = salt
        # The length keeps "ab" + "c" and "a" + "bc" apart.
        self._root = root_key(f"{len(namespace)}:{namespace}{salt or ''}")
        self.keys: list[ContentKey] = []
        self.hashes: list[SequenceHash] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """`token_ids` is the whole sequence; what was hashed before is not read again. Cost: about 2 µs a new block."""
        size = self._block_size
        known = len(self.keys)
        if (known + 1) * size > len(token_ids):
            return
        fresh = token_ids[known * size :]
        parent = self.hashes[-1] if self.hashes else None
        self.hashes += sequence_hashes(fresh, size, self._salt, parent)
        key = self.keys[-1] if self.keys else self._root
        for start in range(0, len(fresh) - size + 1, size):
            key = next_content_key(key, fresh[start : start + size])
            self.keys.append(key)
