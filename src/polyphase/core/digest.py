"""A short summary of which blocks are held, the same at a worker and at each listener that knows exactly what the worker holds.

    sum = mix(h0) + mix(h1) + ..  modulo 2**64, over the sequence hashes of the set, in whatever order

A block that comes or goes costs one addition or subtraction. Not meant against malice: who can forge events can forge digests.
"""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.core import native

_MASK = (1 << 64) - 1


def mixed(sequence_hash: int) -> int:
    """Spreads one hash over 64 bits, so that a sum tells sets apart whatever their hashes are.

    Source: the output function of SplitMix64 (Steele, Lea, Flood, 2014), with the hash as its state.
    """
    word = (sequence_hash + 0x9E3779B97F4A7C15) & _MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)


def digest_sum(sequence_hashes: Iterable[int]) -> int:
    """The sum over these hashes, each of which counts as often as it comes. Cost: 10 ns a hash with the extension, 0.6 µs without."""
    if native.extension is not None:
        total: int = native.extension.digest_sum(sequence_hashes)
        return total
    return sum(map(mixed, sequence_hashes)) & _MASK


def add_sums(one: int, other: int) -> int:
    return (one + other) & _MASK


def subtract_sums(one: int, other: int) -> int:
    return (one - other) & _MASK
