"""Keeps account, in the workers of a real deployment, of what each peer asked for and what it was told: at most one end for each request.

A frontend drops what it does not expect, so that clients never see a worker that answers twice, or after the end. Here it shows.

    Submit ─► opened          StepOutputs that a peer can get ─► tokens only while open, one finish reason, nothing after it

Violations are lines in files of the folder, one file for each process; a killed process loses none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from polyphase.testing.planting import plant


class Ledger:
    """The side that reads. `folder` must outlive the deployment; its owner removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve() / "ledger"
        self._folder.mkdir(parents=True, exist_ok=True)
        plant(folder.resolve(), __name__)

    def violations(self) -> list[str]:
        return [line for path in sorted(self._folder.glob("*.violations")) for line in path.read_text().splitlines()]

    def ended_count(self) -> int:
        """Requests that were seen to end: an account of nothing says nothing. Killed workers' are not counted."""
        return sum(path.stat().st_size for path in self._folder.glob("*.ends"))


class Account:
    """Of one worker's life: names of requests that are open with each peer, and of those that were."""

    def __init__(self) -> None:
        self._open: set[tuple[bytes, str]] = set()
        self._over: set[tuple[bytes, str]] = set()

    def submitted(self, peer: bytes, request_id: str) -> None:
        key = (peer, request_id)
        self._over.discard(key)  # a name may be used again by the same peer when its first use is over
        self._open.add(key)

    def told(self, peer: bytes, output: Any) -> str | None:
        """Returns: what is wrong with telling this."""
        key = (peer, output.request_id)
        if key in self._open:
            if output.finish_reason is not None:
                self._open.discard(key)
                self._over.add(key)
            return None
        what = f"{output.finish_reason or 'tokens'} for {output.request_id} ({len(output.token_ids)} tokens)"
        return f"{what} after its end" if key in self._over else f"{what}, which this peer never asked for"


def install(folder: Path) -> None:
    """In a worker's process."""
    from polyphase.runtime.channel import WorkerServer
    from polyphase.wire.requests import StepOutputs, Submit

    accounts: dict[int, Account] = {}  # by server: several workers may share a process
    made, send = WorkerServer.__init__, WorkerServer.send
    violations, ends = folder / "ledger" / f"{os.getpid()}.violations", folder / "ledger" / f"{os.getpid()}.ends"

    def init(self: WorkerServer, endpoint: str, handler: Any, *further: Any) -> None:
        account = accounts[id(self)] = Account()

        def handle(peer: Any, message: Any) -> None:
            if isinstance(message, Submit):
                account.submitted(peer, message.request_id)
            handler(peer, message)

        made(self, endpoint, handle, *further)

    def tell(self: WorkerServer, peer: Any, message: Any) -> Any:
        delivery = send(self, peer, message)
        if delivery and isinstance(message, StepOutputs):
            for output in message.outputs:
                if (wrong := accounts[id(self)].told(peer, output)) is not None:
                    with violations.open("a") as file:
                        file.write(f"worker {message.worker_id} told a peer: {wrong}\n")
                elif output.finish_reason is not None:
                    with ends.open("a") as file:
                        file.write(".")
        return delivery

    WorkerServer.__init__, WorkerServer.send = init, tell  # type: ignore[method-assign, assignment]
