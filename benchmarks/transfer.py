"""The transfer library beside NIXL, beside a bare C copy of the same blocks, and beside a bare socket: scattered cold blocks, one core.

    python benchmarks/transfer.py --json
    python benchmarks/transfer.py --install-peer     # makes an environment with NIXL for this and later runs; no GPU and no CUDA needed

The owner of the blocks is another process; the reader copies with `Session.fetch`, on its own thread. Each round reads the same list of
blocks with ours, with the bare loops, and with NIXL (READ over its default transport, progress thread off, memory registered once, lists
prepared once, in processes of its own), who take turns in being first. Rates are bytes over the CPU time of all threads of the reading
process, which other work on the machine disturbs less than wall time; medians over the rounds. Every round draws other blocks out of
pools of 1 GiB, so that little of them is in the cache.

`*_of_limit` divides by the faster of two bare C loops over the same lists: memcpy, and 32-byte non-temporal stores. `tcp_of_socket`
compares CPU time of both ends for the same blocks between the same two processes: ours, which checks each block, against sendmsg and
recvmsg_into of a megabyte a call, which check nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import peer
from harness import STDERR, Figure, arguments, percentile, report
from polyphase.core import native
from polyphase.transfer import Agent, LocalBlocks, RemoteBlocks, SharedPool
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend

POOL_BYTES = 1 << 30
SHAPES = {"16k": (16 << 10, 1024), "64k": (64 << 10, 512), "1m": (1 << 20, 64)}
NOTIFICATIONS = 3000
TCP_BLOCK_BYTES, TCP_BLOCKS = 64 << 10, 4096
BARE_STEP = (1 << 20) // TCP_BLOCK_BYTES

LOOPS = r"""
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx2")))
void stream(char *to, const uint64_t *to_ids, const char *from, const uint64_t *from_ids, uint64_t count, uint64_t width) {
    for (uint64_t i = 0; i < count; ++i) {
        char *t = to + to_ids[i] * width;
        const char *f = from + from_ids[i] * width;
        for (uint64_t at = 0; at < width; at += 64) {
            __m256i a = _mm256_loadu_si256((const __m256i *)(f + at)), b = _mm256_loadu_si256((const __m256i *)(f + at + 32));
            _mm256_stream_si256((__m256i *)(t + at), a);
            _mm256_stream_si256((__m256i *)(t + at + 32), b);
        }
    }
    _mm_sfence();
}
#endif
void plain(char *to, const uint64_t *to_ids, const char *from, const uint64_t *from_ids, uint64_t count, uint64_t width) {
    for (uint64_t i = 0; i < count; ++i) memcpy(to + to_ids[i] * width, from + from_ids[i] * width, width);
}
"""


def bare_loops(folder: Path) -> dict[str, Callable[..., None]]:
    """Compiled here and now; empty where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        STDERR.print("there is no C compiler: no bare loops to compare with")
        return {}
    (folder / "loops.c").write_text(LOOPS)
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", folder / "loops.so", folder / "loops.c"], check=True)
    library = ctypes.CDLL(str(folder / "loops.so"))
    loops: dict[str, Callable[..., None]] = {}
    for name in ("plain", "stream"):
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_uint64] * 2
            function.restype = None
            loops[name] = function
    return loops


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def own_blocks(pipe: Connection, block_bytes: int, tcp_address: str | None) -> None:
    """In a process of its own: a pool with something in it, until told to stop; answers notifications."""
    host = None if tcp_address is None else "another host"
    backends = [ShmBackend(), TcpBackend()]
    with (
        Agent("owner", backends=backends, tcp_address=tcp_address, host=host) as agent,
        SharedPool.create(POOL_BYTES // block_bytes, block_bytes) as pool,
    ):
        pattern = random.Random(1).randbytes(1 << 20)
        for start in range(0, POOL_BYTES, len(pattern)):
            pool.blocks[start : start + len(pattern)] = pattern
        with agent.register(pool) as region:
            pipe.send((agent.metadata(), region.region_id))
            while True:
                word = pipe.recv()
                if word == "echo":
                    for _ in range(NOTIFICATIONS):
                        notification = agent.notification(60)
                        notification.reply(notification.payload)
                elif word[0] == "send":
                    blocks = [pool.blocks[block * block_bytes : (block + 1) * block_bytes] for block in word[2]]
                    began = time.process_time_ns()
                    send_bare(blocks, word[1])
                    pipe.send(time.process_time_ns() - began)
                elif word == "cpu":
                    pipe.send(time.process_time_ns())
                else:
                    return


class Owner:
    """The other process. Owner: the `with` block."""

    def __init__(self, block_bytes: int, tcp_address: str | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=own_blocks, args=(theirs, block_bytes, tcp_address), daemon=True)

    def __enter__(self) -> Owner:
        self._process.start()
        self.metadata, self.region_id = self.pipe.recv()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.pipe.send("stop")
        self._process.join(30)

    def cpu_ns(self) -> int:
        self.pipe.send("cpu")
        return int(self.pipe.recv())


def measure_shape(
    block_bytes: int, count: int, rounds: int, loops: dict[str, Callable[..., None]], nixl: peer.Talking | None
) -> dict[str, float]:
    """Rates in GB/s of CPU time, by name."""
    rng = random.Random(block_bytes)
    block_count = POOL_BYTES // block_bytes
    rates: dict[str, list[float]] = {}
    with (
        Owner(block_bytes) as owner,
        Agent("reader") as agent,
        SharedPool.create(block_count, block_bytes) as pool,
        agent.register(pool) as region,
        agent.connect(owner.metadata) as session,
        SharedPool.create(block_count, block_bytes) as bare,
    ):
        bare.blocks[:] = pool.blocks
        everything = range(block_count)  # once over all pages, as the other sides have done when they registered theirs
        session.fetch(session.blocks(owner.region_id, everything, [1] * block_count), region.blocks(everything)).require()
        for number in range(rounds + 1):
            sources, targets = rng.sample(range(block_count), count), rng.sample(range(block_count), count)
            remote, local = session.blocks(owner.region_id, sources, [1] * count), region.blocks(targets)
            from_ids, to_ids = array("Q", sources), array("Q", targets)

            def ours(remote: RemoteBlocks = remote, local: LocalBlocks = local) -> int:
                began = time.process_time_ns()
                outcome = session.fetch(remote, local)
                took = time.process_time_ns() - began
                outcome.require()
                return took

            def bare_copy(loop: Callable[..., None], to: array[int] = to_ids, from_: array[int] = from_ids) -> int:
                began = time.process_time_ns()
                loop(address(pool.blocks), to.buffer_info()[0], address(bare.blocks), from_.buffer_info()[0], count, block_bytes)
                return time.process_time_ns() - began

            contenders: dict[str, Callable[[], int]] = {"ours": ours}
            contenders |= {name: partial(bare_copy, loop) for name, loop in loops.items()}
            if nixl is not None:
                contenders["nixl"] = lambda job={"sources": sources, "targets": targets}: int(nixl.ask(job)["cpu_ns"])  # type: ignore[misc]
            order = list(contenders)
            took = {name: contenders[name]() for name in order[number % len(order) :] + order[: number % len(order)]}
            if number:  # the first maps and faults
                for name, duration_ns in took.items():
                    rates.setdefault(name, []).append(count * block_bytes / duration_ns)
    return {name: statistics.median(values) for name, values in rates.items()}


def measure_notifications() -> tuple[float, float]:
    """Round trips in microseconds, p50 and p99: this thread sends and waits, a thread of another process answers."""
    with Owner(1 << 20) as owner, Agent("reader") as agent, agent.connect(owner.metadata) as session:
        owner.pipe.send("echo")
        took = []
        for _ in range(NOTIFICATIONS):
            began = time.perf_counter_ns()
            session.notify(b"done")
            agent.notification(60)
            took.append((time.perf_counter_ns() - began) / 1e3)
    return percentile(took, 0.5), percentile(took, 0.99)


def measure_registration() -> dict[str, float]:
    """What it costs to begin: milliseconds for a pool of 512 MiB, and for meeting and mapping it."""
    with SharedPool.create(8192, 64 << 10) as pool, Agent("owner") as owner, Agent("reader") as reader:
        began = time.perf_counter_ns()
        region = owner.register(pool)
        registered = time.perf_counter_ns()
        with reader.connect(owner.metadata()) as session, SharedPool.create(1, 64 << 10) as own:
            met = time.perf_counter_ns()
            session.fetch(session.blocks(region.region_id, [0], [1]), reader.register(own).blocks([0])).require()
            mapped = time.perf_counter_ns()
    return {"register_us": (registered - began) / 1e3, "connect_ms": (met - registered) / 1e6, "first_read_ms": (mapped - met) / 1e6}


def send_bare(blocks: list[memoryview], port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for start in range(0, len(blocks), BARE_STEP):
            _all(blocks[start : start + BARE_STEP], connection.sendmsg)


def bare_cpu_ns(owner: Owner, sources: list[int], target: list[memoryview]) -> int:
    """CPU time of both ends for these blocks through loopback TCP, a megabyte a call, checked by nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        owner.pipe.send(("send", server.getsockname()[1], sources))
        connection, _ = server.accept()
        with connection:
            began = time.process_time_ns()
            for start in range(0, len(target), BARE_STEP):
                _all(target[start : start + BARE_STEP], lambda batch: connection.recvmsg_into(batch)[0])
            return time.process_time_ns() - began + int(owner.pipe.recv())


def _all(batch: list[memoryview], move: Callable[[list[memoryview]], int]) -> None:
    while batch:
        moved = move(batch)
        while batch and moved >= batch[0].nbytes:
            moved -= batch.pop(0).nbytes
        if moved:
            batch[0] = batch[0][moved:]


def measure_tcp(rounds: int) -> tuple[float, float]:
    """Rate of ours in GB/s of CPU time of both ends, and the bare socket's."""
    rng = random.Random(3)
    width = TCP_BLOCK_BYTES
    block_count, byte_count = POOL_BYTES // width, TCP_BLOCKS * width
    ours, bare = [], []
    with (
        Owner(TCP_BLOCK_BYTES, "127.0.0.1:0") as owner,
        Agent("reader", tcp_address="127.0.0.1:0") as agent,
        SharedPool.create(block_count, width) as pool,
        agent.register(pool) as region,
        agent.connect(owner.metadata) as session,
    ):
        for number in range(rounds + 1):
            sources, targets = rng.sample(range(block_count), TCP_BLOCKS), rng.sample(range(block_count), TCP_BLOCKS)
            remote, local = session.blocks(owner.region_id, sources, [1] * TCP_BLOCKS), region.blocks(targets)
            began = time.process_time_ns() + owner.cpu_ns()
            session.read(remote, local).wait().require()
            took = time.process_time_ns() + owner.cpu_ns() - began
            plain = bare_cpu_ns(owner, sources, [pool.blocks[block * width : (block + 1) * width] for block in targets])
            if number:
                ours.append(byte_count / took)
                bare.append(byte_count / plain)
    return statistics.median(ours), statistics.median(bare)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--install-peer", action="store_true", help="make the peer's environment first, if it is not there")
    parser.add_argument("--only", choices=[*SHAPES, "notify", "tcp", "register"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    STDERR.print(native.status())
    if options.install_peer:
        peer.install_nixl()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        loops = bare_loops(Path(folder))
        for name, (block_bytes, count) in SHAPES.items():
            if options.only in (None, name):
                with (
                    STDERR.status(f"{count} blocks of {block_bytes >> 10} KiB"),
                    peer.nixl(None if options.no_peer else (POOL_BYTES, block_bytes)) as nixl,
                ):
                    rates = measure_shape(block_bytes, count, options.rounds, loops, nixl)
                figures |= shape_figures(name, rates)
    if options.only in (None, "notify"):
        p50, p99 = measure_notifications()
        figures |= {"notify_us_p50": Figure(p50, "us", "<= 60"), "notify_us_p99": Figure(p99, "us")}
    if options.only in (None, "register"):
        figures |= {name: Figure(value, name.rpartition("_")[2]) for name, value in measure_registration().items()}
    if options.only in (None, "tcp"):
        with STDERR.status("tcp"):
            ours, bare = measure_tcp(max(3, options.rounds // 3))
        figures |= {
            "tcp_of_socket": Figure(ours / bare, "ratio", ">= 0.85"),
            "tcp_gb_s": Figure(ours, "GB/s of CPU, both ends", None, bare),
        }
    report("transfer", figures, as_json=options.json)


def shape_figures(name: str, rates: dict[str, float]) -> dict[str, Figure]:
    target = {"16k": ">= 9", "64k": ">= 14", "1m": ">= 15"}[name]
    found = {f"shm_{name}_gb_s": Figure(rates["ours"], "GB/s of CPU", target, rates.get("nixl"))}
    if "nixl" in rates:
        found[f"shm_{name}_vs_nixl"] = Figure(rates["ours"] / rates["nixl"], "ratio", ">= 1.5")
    limit = max(rates.get("plain", 0.0), rates.get("stream", 0.0))
    if limit:
        found[f"shm_{name}_of_limit"] = Figure(rates["ours"] / limit, "ratio", ">= 0.9")
        found[f"limit_{name}_gb_s"] = Figure(limit, "GB/s of CPU")
    return found


if __name__ == "__main__":
    sys.exit(main())
