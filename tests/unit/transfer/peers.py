"""Other processes for tests of the transfer library: owners of blocks that can be killed, stopped, or left to exit by themselves."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

from polyphase.wire.transfer import AgentCard, decode_card

OWNER = """
import base64, json, sys
from polyphase.transfer import Agent, SharedPool
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend

options = json.loads(sys.argv[1])
backends = [ShmBackend(), TcpBackend()] if options["backends"] == "all" else [TcpBackend()]
agent = Agent("owner", backends=backends, tcp_address=options["tcp_address"], host=options["host"], token=options["token"].encode())
pool = SharedPool.create(options["block_count"], options["block_bytes"])
for block_id in range(pool.block_count):
    pool.blocks[block_id * pool.block_bytes : (block_id + 1) * pool.block_bytes] = bytes([block_id % 251]) * pool.block_bytes
region = agent.register(pool)

def say(**words):
    print(json.dumps(words), flush=True)

say(metadata=base64.b64encode(agent.metadata()).decode(), region_id=region.region_id)
for line in sys.stdin:
    match line.split():
        case ["offer", ids]:
            offer = region.offer(json.loads(ids), 60, lambda lease_id, why: say(ended=why.reason))
            say(lease_id=offer.lease_id)
        case ["pinned"]:
            say(pinned=sorted(region.pinned()))
        case ["meet", metadata]:
            session = agent.connect(base64.b64decode(metadata))
            say(met=session.backend)
        case ["take", lease_id]:
            session.take_lease(lease_id)
            session.notify(b"taken")
            say(taken=lease_id)
        case ["leave"]:
            break  # without closing anything
"""


class PeerProcess:
    """An agent with a pool whose block `n` is full of `n % 251`. Owner: the `with` block kills it."""

    def __init__(
        self,
        *,
        block_count: int = 64,
        block_bytes: int = 4096,
        backends: str = "all",
        tcp_address: str | None = None,
        host: str | None = None,
        token: str = "",
        prefix: Sequence[str] = (),
        code: str = OWNER,
    ) -> None:
        options = {
            "block_count": block_count,
            "block_bytes": block_bytes,
            "backends": backends,
            "tcp_address": tcp_address,
            "host": host,
            "token": token,
        }
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", code, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        told = self.hear()
        self.card: AgentCard = decode_card(base64.b64decode(told["metadata"]))
        self.region_id: str = told["region_id"]

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith(b"{"):  # libraries that log to standard output
            line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(f"the peer ended:\n{self.process.stderr.read().decode()}")
        return json.loads(line)

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, *words: str) -> Any:
        self.tell(*words)
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()
