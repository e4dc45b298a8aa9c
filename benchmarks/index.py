"""The prefix index and the block hashing: how many blocks a CPU second applies, what a lookup costs, what a block weighs.

A million blocks in chains of 1,000, stored by events of 32 blocks as a prefill of 512 tokens a step tells them, each chain by one of
the workers; besides, one hot chain that every worker holds to another depth. Lookups are of lists of ints, half of them of the hot
chain, half of other chains, each time another one. CPU time, median of rounds. Peer: Dynamo's RadixTree and its compute_block_hash,
through its Python bindings, on the same blocks, in the same process turn by turn, where they are installed ($PEER_HOME).
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterable

import peer
from harness import STDERR, Figure, arguments, report
from polyphase.core import native
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router import PrefixIndex, default_index
from polyphase.wire.events import BlocksStored

BLOCK_SIZE = 16
CHAIN_BLOCKS = 1000
EVENT_BLOCKS = 32
LOOKUPS = 40  # a round

Event = tuple[WorkerId, BlocksStored]


def chain(rng: random.Random, block_count: int) -> list[SequenceHash]:
    return [SequenceHash(rng.getrandbits(64)) for _ in range(block_count)]


def events_of(chains: Iterable[list[SequenceHash]], workers: list[WorkerId]) -> list[Event]:
    return [
        (workers[number % len(workers)], BlocksStored(list(hashes[start : start + EVENT_BLOCKS])))
        for number, hashes in enumerate(chains)
        for start in range(0, len(hashes), EVENT_BLOCKS)
    ]


def cpu_us(call: Callable[[], object], times: int = 1) -> float:
    """CPU time of one call, less what reading the clock and calling nothing costs."""
    began = time.thread_time_ns()
    for _ in range(times):
        call()
    return max((time.thread_time_ns() - began) / times / 1e3 - EMPTY_US / times, 0.0)


EMPTY_US = 0.0
EMPTY_US = statistics.median(cpu_us(lambda: None) for _ in range(2001))


def apply_all(index: PrefixIndex, events: list[Event]) -> None:
    for worker_id, event in events:
        index.store(worker_id, event.sequence_hashes, event.tier)


def lookup_us(index: PrefixIndex, prompts: list[list[SequenceHash]]) -> float:
    """Mean over prompts whose ints are warm, as they are when they were just hashed; the index is as cold as a million blocks make it."""
    total = 0.0
    for prompt in prompts:
        sum(prompt)
        total += cpu_us(lambda prompt=prompt: index.match(prompt))
    return total / len(prompts)


def prompts_of(chains: list[list[SequenceHash]], hot: list[SequenceHash], length: int, rng: random.Random) -> list[list[SequenceHash]]:
    cold = [rng.choice(chains) for _ in range(LOOKUPS // 2)]
    return [prompt for one in cold for prompt in ((one + chain(rng, length))[:length], hot[:length])]


def measure_index(worker_count: int, block_count: int, rounds: int) -> dict[str, float]:
    rng = random.Random(worker_count)
    workers = [WorkerId(f"worker-{number}") for number in range(worker_count)]
    chains = [chain(rng, CHAIN_BLOCKS) for _ in range(block_count // CHAIN_BLOCKS)]
    events = events_of(chains, workers)
    hot = chain(rng, 1024)
    rates: list[float] = []
    lookups: dict[int, list[float]] = {1024: [], 128: []}
    weight = 0.0
    for _ in range(rounds):
        index = default_index()
        gc.collect()
        rates.append(block_count / cpu_us(lambda index=index: apply_all(index, events)))
        weight = getattr(index, "heap_bytes", 0) / index.size
        for number, worker_id in enumerate(workers):
            index.store(worker_id, hot[: 1024 - number * 900 // worker_count])
        for length, found in lookups.items():
            prompts = prompts_of(chains, hot, length, rng)
            found.append(lookup_us(index, prompts))
    return {
        "apply": statistics.median(rates),
        "1024": statistics.median(lookups[1024]),
        "128": statistics.median(lookups[128]),
        "bytes": weight,
    }


def measure_hashing(rounds: int) -> tuple[float, float]:
    """Million tokens a CPU second, of lists and of arrays."""
    rng = random.Random(1)
    tokens = [rng.randrange(150_000) for _ in range(4096)]
    packed = array("I", tokens)
    lists = [4096 / cpu_us(lambda: sequence_hashes(tokens, BLOCK_SIZE), 50) for _ in range(3 * rounds)]
    arrays = [4096 / cpu_us(lambda: sequence_hashes(packed, BLOCK_SIZE), 50) for _ in range(3 * rounds)]
    return statistics.median(lists), statistics.median(arrays)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    STDERR.print(native.status())
    with STDERR.status("hashing"):
        list_rate, array_rate = measure_hashing(options.rounds)
    measured: dict[int, dict[str, float]] = {}
    for worker_count in (8, 64, 512):
        with STDERR.status(f"{options.blocks:,} blocks, {worker_count} workers"):
            measured[worker_count] = measure_index(worker_count, options.blocks, options.rounds)
    with STDERR.status("the peer"):
        peers = {} if options.no_peer else peer.figures("peer_index.py", str(options.blocks), str(options.rounds))
    figures = {
        "apply_mblocks_per_s": Figure(min(m["apply"] for m in measured.values()), "M blocks/s", ">= 5", peers.get("apply")),
        **{
            f"lookup_1024_us_w{count}": Figure(m["1024"], "us", "<= 10", peers.get(f"lookup_1024_w{count}"))
            for count, m in measured.items()
        },
        "lookup_128_us_w64": Figure(measured[64]["128"], "us", "<= 4", peers.get("lookup_128_w64")),
        "hash_mtokens_per_s": Figure(list_rate, "M tokens/s", ">= 150", peers.get("hash")),
        "hash_arrays_mtokens_per_s": Figure(array_rate, "M tokens/s"),
        "bytes_per_block": Figure(max(m["bytes"] for m in measured.values()), "B", None, peers.get("bytes")),
    }
    report("index", figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
