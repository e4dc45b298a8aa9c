"""Scattered blocks through a socket: the right bytes and sums, in C++ and in Python in any combination; and every way to end early."""

from __future__ import annotations

import random
import socket
import threading
import time
from array import array
from collections.abc import Iterator

import pytest
from xxhash import xxh3_64_intdigest

from polyphase.core import native
from polyphase.core.clock import MonotonicClock
from polyphase.core.errors import PeerLost, TransferError, TransferTimeout
from polyphase.transfer.streaming import receive_blocks, send_blocks, stream_in_python
from polyphase.transfer.wire import Wire


@pytest.fixture(params=["unix", "tcp"])
def wires(request: pytest.FixtureRequest) -> Iterator[tuple[Wire, Wire]]:
    if request.param == "unix":
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            caller = socket.create_connection(server.getsockname())
            ends = (caller, server.accept()[0])
    made = Wire(ends[0], MonotonicClock(), "the receiver"), Wire(ends[1], MonotonicClock(), "the sender")
    for wire in made:
        wire.deadline_ns = time.monotonic_ns() + 20 * 10**9
    yield made
    for wire in made:
        wire.close()


@pytest.mark.parametrize("width", [1, 100, 4096, 70_001, 2 << 20])
@pytest.mark.parametrize("python_end", ["sender", "receiver", "neither"])
def test_blocks_arrive_in_their_places(width: int, python_end: str, wires: tuple[Wire, Wire]) -> None:
    sender, receiver = wires
    count = max(3, min(1500, (6 << 20) // width))
    rng = random.Random(width)
    source = memoryview(bytearray(rng.randbytes(width * count)))
    target = memoryview(bytearray(width * count))
    sent_ids, received_ids = array("Q", rng.sample(range(count), count)), array("Q", rng.sample(range(count), count))
    sent: list[array[int]] = []

    def send() -> None:
        if python_end == "sender":
            sent.append(stream_in_python(source, width, sent_ids, sender.send_buffers))
        else:
            sent.append(send_blocks(sender, source, width, sent_ids))

    thread = threading.Thread(target=send)
    thread.start()
    if python_end == "receiver":
        received = stream_in_python(target, width, received_ids, receiver.receive_buffers)
    else:
        received = receive_blocks(receiver, target, width, received_ids)
    thread.join()
    assert received == sent[0]
    for there, here, found in zip(sent_ids, received_ids, received, strict=True):
        block = target[here * width : (here + 1) * width]
        assert block == source[there * width : (there + 1) * width]
        assert found == xxh3_64_intdigest(block)


@pytest.mark.parametrize("function", [send_blocks, receive_blocks])
def test_it_ends_by_the_deadline(function: object, wires: tuple[Wire, Wire]) -> None:
    wire = wires[0]
    wire.deadline_ns = time.monotonic_ns() + 50_000_000
    memory = memoryview(bytearray(64 << 20))
    with pytest.raises(TransferTimeout, match="the receiver did not answer in time"):
        function(wire, memory, 1 << 20, array("Q", range(64)))  # type: ignore[operator]
    assert wire.is_closed


@pytest.mark.parametrize("function", [send_blocks, receive_blocks])
def test_a_peer_that_closes(function: object, wires: tuple[Wire, Wire]) -> None:
    wires[1].close()
    with pytest.raises(PeerLost):
        function(wires[0], memoryview(bytearray(64 << 20)), 1 << 20, array("Q", range(64)))  # type: ignore[operator]
    assert wires[0].is_closed


def test_being_broken_off_by_another_thread(wires: tuple[Wire, Wire]) -> None:
    threading.Timer(0.05, wires[0].break_off).start()
    with pytest.raises(PeerLost):
        receive_blocks(wires[0], memoryview(bytearray(1 << 20)), 1 << 20, array("Q", [0]))


def test_a_released_memory(wires: tuple[Wire, Wire]) -> None:
    memory = memoryview(bytearray(100))
    memory.release()
    with pytest.raises(TransferError):
        send_blocks(wires[0], memory, 10, array("Q", [0]))
    assert wires[0].is_closed


@pytest.mark.skipif(not native.is_native(), reason="the extension is not built")
def test_the_wide_sum_is_that_of_the_package() -> None:
    assert native.extension is not None
    rng = random.Random(1)
    for size in [*range(0, 300), *range(960, 1100), 2047, 2048, 2049, 4096, 65_536, 100_001]:
        data = rng.randbytes(size)
        assert native.extension.sum_block(data) == xxh3_64_intdigest(data), size
