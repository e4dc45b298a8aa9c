"""Workers' KV pools, changed under their readers."""

from __future__ import annotations

import contextlib
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

from polyphase.core.errors import TransferError
from polyphase.testing.connections import CannotCut
from polyphase.transfer.layout import PAGE_BYTES, PoolLayout


@dataclass(frozen=True)
class Pool:
    pid: int
    address: int  # of its generations, in the process's own memory
    block_count: int


def find_pool(pid: int) -> Pool:
    """Raises: CannotCut; FileNotFoundError if it has none; ProcessLookupError."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:" not in line or "w" not in line.split()[1]:
            continue
        address = int(line.split("-")[0], 16)
        try:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, contextlib.suppress(TransferError, OSError):
                memory.seek(address)
                return Pool(pid, address + PAGE_BYTES, PoolLayout.unpack(memory.read(PAGE_BYTES)).block_count)
        except PermissionError as error:
            raise CannotCut(f"the memory of process {pid} cannot be opened: {error}") from error
    raise FileNotFoundError(f"process {pid} has no block pool")


def renew_for_a_while(pool: Pool, seconds: float = 1.0) -> None:
    """Every block's generation, as fast as it goes. The pool is sealed against other processes: so through the worker's own memory."""
    until_s = time.monotonic() + seconds
    with contextlib.suppress(OSError):  # it died meanwhile
        while time.monotonic() < until_s:
            with open(f"/proc/{pool.pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(pool.address)
                generations = array("Q", memory.read(8 * pool.block_count))
                memory.seek(pool.address)
                memory.write(array("Q", (one + 1 for one in generations)).tobytes())
            time.sleep(0.001)
