"""Blocks of KV damaged on their way between the workers of a real deployment: bits flipped, blocks swapped, streams cut short.

    with TemporaryDirectory() as folder:
        faults = WireFaults(Path(folder))
        with Deployment("demo", "--prefill", "1", "--decode", "1", environment=faults.environment()) as served:
            faults.order("flip")  # carried out on the next blocks that any worker sends; order("flip", pid) on that worker's
            ...                   # the request's tokens are the right ones nevertheless
            assert faults.carried_out() == ["flip"]

Every worker that is started in that environment takes itself to be on a host of its own and listens on loopback, so that blocks travel over
`tcp`, unmapped and through real sockets. An order is a file in the folder; the worker that finds it damages what it is about to send, after
the checksums were taken, and moves the file. Orders outlive workers, and workers that were killed with them on their desk lose nothing: an
order is taken in the moment it is carried out. Production code knows nothing of this: it is patched by a `sitecustomize` in the folder.
"""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from xxhash import xxh3_64_intdigest

from polyphase.core.errors import PeerLost
from polyphase.testing.planting import plant, planted_environment

FaultKind = Literal["flip", "swap", "truncate"]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class WireFaults:
    """The side that gives the orders. `folder` must outlive the deployment; its owner removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._numbers = count()
        for name in ("orders", "done"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        plant(self._folder, __name__)

    def environment(self) -> dict[str, str]:
        """For `Deployment(environment=…)`."""
        return planted_environment(self._folder)

    def order(self, kind: FaultKind, pid: int | None = None) -> None:
        """Damage the next request's worth of blocks that is sent, by the worker `pid` or by anyone. Orders are carried out one by one.

        flip: one bit. swap: two blocks in each other's place (halves, if only one is sent; of equal content, no damage).
        truncate: the connection ends within the blocks.
        """
        if kind not in KINDS:
            raise ValueError(f"there is no damage {kind!r}, only {', '.join(KINDS)}")
        (self._folder / "orders" / f"{next(self._numbers):06}-{kind}-{'any' if pid is None else pid}").touch()

    def pending(self) -> int:
        return len(os.listdir(self._folder / "orders"))

    def withdraw(self) -> None:
        """What was not carried out yet never will be."""
        for path in (self._folder / "orders").iterdir():
            path.unlink(missing_ok=True)

    def carried_out(self) -> list[str]:
        """Kinds, in the order of the orders."""
        return [name.split("-")[1] for name in sorted(os.listdir(self._folder / "done"))]


def install(folder: Path) -> None:
    """In a worker's process, before its agent is made: a host of its own, reachable by loopback, and blocks that are damaged by order."""
    from polyphase.transfer import agent, staging
    from polyphase.transfer.doors import Doors
    from polyphase.transfer.streaming import send_blocks

    def doors(unix_path: str | None, tcp_address: str | None) -> Doors:
        return Doors(unix_path, tcp_address or "127.0.0.1:0")

    patches: list[tuple[Any, str, Any]] = [
        (agent, "host_id", lambda: f"host of process {os.getpid()}"),
        (agent, "Doors", doors),
        (staging, "send_blocks", damaging(send_blocks, lambda: _take_order(folder))),
    ]
    for module, name, replacement in patches:
        setattr(module, name, replacement)
    print(f"blocks are sent over tcp, and damaged by orders in {folder}", file=sys.stderr)


Send = Callable[[Any, memoryview, int, "array[int]"], "array[int]"]


def damaging(send_blocks: Send, next_order: Callable[[], tuple[FaultKind, int] | None]) -> Send:
    """`transfer.streaming.send_blocks`, except that what is sent is damaged when there is an order: its kind, and a seed."""

    def send(wire: Any, memory: memoryview, block_bytes: int, ids: array[int]) -> array[int]:
        order = next_order() if ids else None
        if order is None:
            return send_blocks(wire, memory, block_bytes, ids)
        blocks = [memory[block_id * block_bytes : (block_id + 1) * block_bytes] for block_id in ids]
        sums = array("Q", [xxh3_64_intdigest(block) for block in blocks])
        kind, seed = order
        data = damaged(b"".join(blocks), block_bytes, kind, random.Random(seed))
        wire.send_buffers([memoryview(data)])
        if kind == "truncate":
            wire.close()
            raise PeerLost("the connection was cut by order")
        return sums

    return send


def damaged(data: bytes, block_bytes: int, kind: FaultKind, rng: random.Random) -> bytearray:
    """A copy of `data`, whole blocks back to back, with one damage."""
    copy = bytearray(data)
    if kind == "flip":
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del copy[rng.randrange(len(copy)) :]
    else:
        width = block_bytes if len(copy) > block_bytes else block_bytes // 2
        first, second = sorted(rng.sample(range(len(copy) // width), 2))
        here, there = slice(first * width, (first + 1) * width), slice(second * width, (second + 1) * width)
        copy[here], copy[there] = copy[there], copy[here]
    return copy


def _take_order(folder: Path) -> tuple[FaultKind, int] | None:
    for name in sorted(os.listdir(folder / "orders")):
        number, kind, who = name.split("-")
        if who in ("any", str(os.getpid())):
            try:
                os.rename(folder / "orders" / name, folder / "done" / name)
            except FileNotFoundError:  # another worker was faster, or it was withdrawn
                continue
            return kind, int(number)  # type: ignore[return-value]
    return None
