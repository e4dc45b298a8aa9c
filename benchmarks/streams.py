"""The event stream without the sockets: what a worker pays to publish, and what a snapshot of a million blocks costs both sides.

A snapshot is read in pages; what matters is the longest time for which one of them holds a loop. Half way, a third of the blocks is removed
in no order, which leaves holes in what the worker remembers. CPU time.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, field

import msgspec

from harness import STDERR, Figure, arguments, report
from polyphase.core.ids import Epoch, SequenceHash, WorkerId
from polyphase.router import Router, RouterSettings, WorkerFacts
from polyphase.runtime.fence import unpacked
from polyphase.runtime.stream import BatchSource
from polyphase.wire.cards import Role
from polyphase.wire.events import BlocksRemoved, BlocksStored, Load, SnapshotPage, Tier

EVENT_BLOCKS = 32
NAME, EPOCH = WorkerId("worker"), Epoch(1)


@dataclass
class Costs:
    """Milliseconds of CPU for each page."""

    worker: list[float] = field(default_factory=list)
    listener: list[float] = field(default_factory=list)


def cpu_ms() -> float:
    return time.thread_time_ns() / 1e6


def fill(source: BatchSource, block_count: int, rng: random.Random) -> float:
    """Returns: microseconds a block."""
    chains = [[rng.getrandbits(64) for _ in range(EVENT_BLOCKS)] for _ in range(block_count // EVENT_BLOCKS)]
    began = cpu_ms()
    for hashes in chains:
        source.next_batch([BlocksStored(hashes)], Load())
    return (cpu_ms() - began) / block_count * 1e3


def new_listener() -> Router:
    router = Router(RouterSettings())
    router.upsert_worker(
        WorkerFacts(
            worker_id=NAME,
            epoch=EPOCH,
            model="m",
            role=Role.BOTH,
            block_size=16,
            block_count=10**6,
            max_batch_tokens=8192,
            max_running=256,
            can_hand_over=False,
        )
    )
    return router


def take_snapshot(source: BatchSource) -> Costs:
    router, costs, cursor = new_listener(), Costs(), None
    while True:
        began = cpu_ms()
        data = msgspec.msgpack.encode(source.page(cursor))
        costs.worker.append(cpu_ms() - began)
        began = cpu_ms()
        page = msgspec.msgpack.decode(data, type=SnapshotPage)
        for tier, packed in page.blocks.items():
            router.index.store(NAME, unpacked(packed), tier)  # type: ignore[arg-type]
        costs.listener.append(cpu_ms() - began)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert router.digests(NAME, EPOCH) == source.ledger.digests()
    return costs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    options = parser.parse_args()
    rng = random.Random(1)
    source = BatchSource(NAME, EPOCH)
    with STDERR.status("publishing"):
        publish_us = fill(source, options.blocks, rng)
    with STDERR.status("a snapshot"):
        whole = take_snapshot(source)
    with STDERR.status("a snapshot with holes"):
        gone = rng.sample(sorted(source.ledger.held(Tier.DEVICE)), options.blocks // 3)
        source.next_batch([BlocksRemoved([SequenceHash(one) for one in gone])], Load())
        holed = take_snapshot(source)
    figures = {
        "publish_us_per_block": Figure(publish_us, "us"),
        "snapshot_worker_page_max_ms": Figure(max(*whole.worker, *holed.worker), "ms", "<= 5"),
        "snapshot_worker_ms": Figure(sum(whole.worker), "ms"),
        "snapshot_worker_holes_ms": Figure(sum(holed.worker), "ms"),
        "snapshot_listener_page_median_ms": Figure(sorted(whole.listener)[len(whole.listener) // 2], "ms"),
        "snapshot_listener_page_max_ms": Figure(max(whole.listener), "ms"),
        "snapshot_listener_ms": Figure(sum(whole.listener), "ms"),
    }
    report("streams", figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
