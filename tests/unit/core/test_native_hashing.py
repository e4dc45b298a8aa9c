"""The extension's own hashing; collected where the extension is there."""

from __future__ import annotations

import random
import threading
from array import array

import xxhash

from polyphase.core import native
from polyphase.core.hashing import HASH_SEED, sequence_hashes
from polyphase.core.ids import SequenceHash


def test_every_length_hashes_as_the_xxhash_package_does():
    rng = random.Random(11)
    for size in [*range(600), 1023, 1024, 1025, 2047, 2048, 2049, 5000, 10_000]:
        data = rng.randbytes(size)
        for seed in (0, HASH_SEED, 2**64 - 1, rng.getrandbits(64)):
            assert native.extension.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed), f"{size} bytes, seed {seed}"


def test_buffers_are_hashed_from_several_threads():
    tokens = array("I", [random.Random(5).randrange(2**32) for _ in range(100_000)])
    expected = sequence_hashes(tokens, 16)
    results: list[list[SequenceHash]] = []
    threads = [threading.Thread(target=lambda: results.append(sequence_hashes(tokens, 16))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
