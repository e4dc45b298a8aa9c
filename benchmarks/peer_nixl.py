"""NIXL's side of benchmarks/transfer.py, run in NIXL's own environment: `peer_nixl.py owner|reader POOL_BYTES BLOCK_BYTES`.

Lines of JSON on standard input and output. The owner registers a pool and prints its metadata and address; the reader is given them, reads
the blocks it is asked for, and says how much CPU time all its threads took from post to completion. Memory is numpy on huge pages where
the system gives them, registered once; descriptor lists over the whole pools are prepared once; handles are made outside of the time.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import select
import sys
import time
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config


def memory(byte_count: int) -> np.ndarray[Any, Any]:
    area = mmap.mmap(-1, byte_count + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, dtype=np.uint8)
    start = -whole.ctypes.data % (2 << 20)
    pool = whole[start : start + byte_count]
    pool[:] = 7
    return pool


def agent_with(name: str, pool: np.ndarray[Any, Any]) -> nixl_agent:
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "pool")], "DRAM")
    return agent


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def own(pool_bytes: int) -> None:
    pool = memory(pool_bytes)
    agent = agent_with("owner", pool)
    say(metadata=base64.b64encode(agent.get_agent_metadata()).decode(), address=pool.ctypes.data)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        agent.get_new_notifs()  # without its progress thread, the first connection comes about only while both sides poll


def read(pool_bytes: int, block_bytes: int) -> None:
    pool = memory(pool_bytes)
    agent = agent_with("reader", pool)
    told = json.loads(sys.stdin.readline())
    remote = agent.add_remote_agent(base64.b64decode(told["metadata"]))
    blocks = range(pool_bytes // block_bytes)
    local_list = agent.prep_xfer_dlist("NIXL_INIT_AGENT", [(pool.ctypes.data + b * block_bytes, block_bytes, 0) for b in blocks], "DRAM")
    remote_list = agent.prep_xfer_dlist(remote, [(told["address"] + b * block_bytes, block_bytes, 0) for b in blocks], "DRAM")
    say(is_ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        handle = agent.make_prepped_xfer("READ", local_list, job["targets"], remote_list, job["sources"])
        began, wall = time.process_time_ns(), time.perf_counter_ns()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        took, wall = time.process_time_ns() - began, time.perf_counter_ns() - wall
        agent.release_xfer_handle(handle)
        if state != "DONE" or pool[job["targets"][0] * block_bytes] != 7:
            raise SystemExit(f"the transfer ended as {state}")
        say(cpu_ns=took, wall_ns=wall)


if __name__ == "__main__":
    if sys.argv[1] == "owner":
        own(int(sys.argv[2]))
    else:
        read(int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # its library crashes at an ordinary exit
