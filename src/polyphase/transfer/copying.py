"""The batch copy between two memories of this host: in C++ without the interpreter lock, or in Python where there is no compiler.

Both compare each block's generation before and after its bytes are copied, so that a block which its owner gave to other content in
between is found out, and both write one verdict per block.
"""

from __future__ import annotations

import threading
from array import array
from dataclasses import dataclass

from polyphase.core import native
from polyphase.core.errors import TransferError
from polyphase.transfer.blocks import NO_WORDS
from polyphase.transfer.verdicts import Verdict

STOP_CHECK_BYTES = 1 << 20

_order = threading.Lock()
_NO_WORDS_VIEW = memoryview(b"").cast("B")


@dataclass(frozen=True, slots=True)
class Copy:
    """`verdicts` and `stop` are written by the copy and by others meanwhile; everything else stands still."""

    target: memoryview
    target_ids: array[int]
    source: memoryview
    source_ids: array[int]
    block_bytes: int
    generations: memoryview | None  # of the source, one word for each of its blocks; None: nothing is compared
    expected: array[int]  # for each copied block
    verdicts: memoryview
    stop: bytearray  # one byte; when it is no longer zero, the copy ends within about a megabyte


def copy_blocks(copy: Copy) -> None:
    """Fill `copy.verdicts`; blocks that `stop` prevented stay PENDING.

    Raises: TransferError if a memory was released meanwhile, or the lists do not fit the memories.
    Cost: 8 to 15 GB/s a core for blocks that are not in the cache.
    """
    try:
        if native.extension is not None:
            native.extension.copy_blocks(
                copy.target,
                copy.target_ids,
                copy.source,
                copy.source_ids,
                copy.block_bytes,
                _NO_WORDS_VIEW if copy.generations is None else copy.generations,
                NO_WORDS if copy.generations is None else copy.expected,
                copy.verdicts,
                copy.stop,
            )
        else:
            copy_blocks_in_python(copy)
    except (ValueError, IndexError) as error:  # also what a released view raises
        raise TransferError(f"the blocks cannot be copied: {error}") from error


def copy_blocks_in_python(copy: Copy) -> None:
    """The same, one slice after the other."""
    width, source, target = copy.block_bytes, copy.source, copy.target
    unchecked = 0
    for place, (target_id, source_id) in enumerate(zip(copy.target_ids, copy.source_ids, strict=True)):
        if unchecked >= STOP_CHECK_BYTES:
            unchecked = 0
            if copy.stop[0]:
                return
        unchecked += width
        verdict = Verdict.STALE
        if _is_as_expected(copy, place, source_id):
            target[target_id * width : (target_id + 1) * width] = source[source_id * width : (source_id + 1) * width]
            _keep_order()
            if _is_as_expected(copy, place, source_id):
                verdict = Verdict.DONE
        copy.verdicts[place] = verdict


def _is_as_expected(copy: Copy, place: int, source_id: int) -> bool:
    return copy.generations is None or copy.generations[source_id] == copy.expected[place]


def _keep_order() -> None:
    """Processors that reorder reads (ARM) must not look at the generation before the copy is done; locks forbid it."""
    with _order:
        pass
    with _order:
        pass
