"""Device memory of two processes on one GPU: the `cuda` backend, scattered blocks, beside a device-to-device copy within one process.

    python benchmarks/transfer_cuda.py --json

Needs a CUDA device; has not been run on one yet. Wall time from post to verdicts, medians; the limit is index_select and index_copy_ of
the same lists on tensors of one process, which is what the backend enqueues.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection

import torch

from harness import Figure, arguments, report
from polyphase.transfer import Agent
from polyphase.transfer.backends.cuda import CudaBackend
from polyphase.transfer.device import CudaMemory, copy_rows

POOL_BYTES = 1 << 30
SHAPES = {"16k": (16 << 10, 1024), "64k": (64 << 10, 512), "1m": (1 << 20, 64)}


def own(pipe: Connection, block_bytes: int) -> None:
    memory = CudaMemory(torch.ones(POOL_BYTES, dtype=torch.uint8, device="cuda"), block_bytes)
    torch.cuda.synchronize()
    with Agent("owner", backends=[CudaBackend()]) as agent, agent.register(memory) as region:
        pipe.send((agent.metadata(), region.region_id))
        pipe.recv()


def measure(block_bytes: int, count: int, rounds: int) -> tuple[float, float]:
    """GB/s of ours and of the limit."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=own, args=(theirs, block_bytes), daemon=True)
    process.start()
    metadata, region_id = pipe.recv()
    memory = CudaMemory(torch.zeros(POOL_BYTES, dtype=torch.uint8, device="cuda"), block_bytes)
    other = torch.ones_like(memory.rows)
    ours, limit = [], []
    with Agent("reader", backends=[CudaBackend()]) as agent, agent.register(memory) as region, agent.connect(metadata) as session:
        for number in range(rounds + 1):
            sources, targets = (random.sample(range(memory.block_count), count) for _ in range(2))
            remote, local = session.blocks(region_id, sources, [1] * count), region.blocks(targets)
            began = time.perf_counter()
            session.fetch(remote, local).require()
            took = time.perf_counter() - began
            torch.cuda.synchronize()
            began = time.perf_counter()
            copy_rows(torch, other, sources, memory.rows, targets)
            torch.cuda.synchronize()
            if number:
                limit.append(count * block_bytes / (time.perf_counter() - began) / 1e9)
                ours.append(count * block_bytes / took / 1e9)
    pipe.send("stop")
    process.join(30)
    return statistics.median(ours), statistics.median(limit)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    figures: dict[str, Figure] = {}
    for name, (block_bytes, count) in SHAPES.items():
        ours, limit = measure(block_bytes, count, options.rounds)
        figures[f"cuda_{name}_gb_s"] = Figure(ours, "GB/s", None, limit)
        figures[f"cuda_{name}_of_limit"] = Figure(ours / limit, "ratio")
    report("transfer_cuda", figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
