"""The batch copy, in C++ and in Python: the right bytes in the right places, and the right verdict on each block."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core import native
from polyphase.core.errors import TransferError
from polyphase.transfer.copying import Copy, copy_blocks, copy_blocks_in_python
from polyphase.transfer.verdicts import Verdict

KERNELS: dict[str, Callable[[Copy], None]] = {"best": copy_blocks, "python": copy_blocks_in_python}


def job(source: bytes, source_ids: list[int], target_ids: list[int], width: int, target_count: int) -> Copy:
    return Copy(
        target=memoryview(bytearray(width * target_count)),
        target_ids=array("Q", target_ids),
        source=memoryview(source),
        source_ids=array("Q", source_ids),
        block_bytes=width,
        generations=memoryview(array("Q", range(100, 100 + len(source) // width))),
        expected=array("Q", [100 + block_id for block_id in source_ids]),
        verdicts=memoryview(bytearray(len(source_ids))),
        stop=bytearray(1),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data())
def test_blocks_go_where_they_should(kernel: str, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 7, 64, 1000, 4096, 4097, 8192 + 63, 20000]))
    source_count, target_count = 9, 11
    source = random.Random(width).randbytes(width * source_count)
    target_ids = data.draw(st.lists(st.integers(0, target_count - 1), unique=True))
    source_ids = data.draw(st.lists(st.integers(0, source_count - 1), min_size=len(target_ids), max_size=len(target_ids)))
    stale = data.draw(st.sets(st.integers(0, max(0, len(target_ids) - 1))) if target_ids else st.just(set()))
    copy = job(source, source_ids, target_ids, width, target_count)
    for place in stale:
        copy.expected[place] += 1
    KERNELS[kernel](copy)
    wanted = bytearray(width * target_count)
    for place, (target_id, source_id) in enumerate(zip(target_ids, source_ids, strict=True)):
        if place not in stale:
            wanted[target_id * width : (target_id + 1) * width] = source[source_id * width : (source_id + 1) * width]
    assert copy.target == wanted
    assert list(copy.verdicts) == [Verdict.STALE if place in stale else Verdict.DONE for place in range(len(target_ids))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("offset", [0, 1, 8, 63])
def test_memory_may_begin_anywhere(kernel: str, offset: int) -> None:
    width = 9000
    source = random.Random(1).randbytes(3 * width + offset)
    copy = job(source[: 3 * width], [2, 0], [0, 2], width, 3)
    whole = memoryview(bytearray(3 * width + offset))
    copy = replace(copy, target=whole[offset:], source=memoryview(source)[offset:])
    KERNELS[kernel](copy)
    assert whole[offset : offset + width] == source[offset + 2 * width : offset + 3 * width]
    assert whole[offset + 2 * width :] == source[offset : offset + width]
    assert not any(whole[:offset])


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_generations_nothing_is_compared(kernel: str) -> None:
    copy = replace(job(b"ab" * 50, [1], [0], 50, 1), generations=None, expected=array("Q"))
    KERNELS[kernel](copy)
    assert list(copy.verdicts) == [Verdict.DONE]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stopped_copy_leaves_the_rest_pending(kernel: str) -> None:
    width = 1 << 20
    copy = job(bytes(8 * width), list(range(8)), list(range(8)), width, 8)
    copy.stop[0] = 1
    KERNELS[kernel](copy)
    assert list(copy.verdicts) == [Verdict.DONE] + [Verdict.PENDING] * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_ids": array("Q", [0, 5])}, "block 5 does not exist"),
        ({"target_ids": array("Q", [0, 9])}, "block 9 does not exist"),
        ({"source_ids": array("Q", [0])}, "as many"),
        ({"expected": array("Q", [0])}, "one expected for each"),
        ({"verdicts": memoryview(bytearray(3))}, "as many"),
        ({"verdicts": memoryview(bytes(2))}, "writable"),
        ({"target": memoryview(bytes(300))}, "writable"),
        ({"source_ids": array("B", [0, 1])}, "64-bit words"),
        ({"block_bytes": 0}, "block_bytes is 0"),
    ],
)
@pytest.mark.skipif(not native.is_native(), reason="the extension is not built")
def test_the_extension_checks_before_it_writes(change: dict[str, object], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        copy_blocks(replace(job(bytes(500), [0, 1], [0, 1], 100, 3), **change))  # type: ignore[arg-type]


def test_a_released_memory_is_an_error() -> None:
    copy = job(bytes(500), [0, 1], [0, 1], 100, 3)
    copy.source.release()
    with pytest.raises(TransferError):
        copy_blocks(copy)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_racing_owner_never_makes_mixed_content_pass(kernel: str) -> None:
    """The owner rewrites blocks, each time with one value all over and under a new generation; what is DONE is never a mixture."""
    width, count = 64 << 10, 8
    source = memoryview(bytearray(width * count))
    generations = memoryview(array("Q", [1] * count))
    writing: list[int] = [-1]
    stop = threading.Event()

    def rewrite() -> None:
        dice = random.Random(7)
        while not stop.is_set():
            block_id = dice.randrange(count)
            writing[0] = block_id
            generations[block_id] += 1
            content = bytes([dice.randrange(256)]) * 1024
            for part in range(0, width, 1024):
                source[block_id * width + part : block_id * width + part + 1024] = content
            writing[0] = -1

    owner = threading.Thread(target=rewrite)
    owner.start()
    try:
        for _ in range(150):
            expected = array("Q", generations)
            unfinished = writing[0]  # an owner offers no block that it still writes
            ids = array("Q", range(count))
            target = memoryview(bytearray(width * count))
            copy = Copy(target, ids, source, ids, width, generations, expected, memoryview(bytearray(count)), bytearray(1))
            KERNELS[kernel](copy)
            for block_id in range(count):
                if copy.verdicts[block_id] == Verdict.DONE and block_id != unfinished:
                    block = bytes(target[block_id * width : (block_id + 1) * width])
                    assert block.count(block[:1]) == width
    finally:
        stop.set()
        owner.join()
