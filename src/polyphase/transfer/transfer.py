"""One batch of blocks on its way.

    posted ──► running ──► done        every block is good
      │           ├──────► failed      some are not: `Outcome.verdicts` says which, and why
      └───────────┴─ deadline, cancel, release ──► failed, as soon as nobody writes any more

It ends once, and always: by its deadline at the latest the backend is told to stop, and a backend's call ends by the job's deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from polyphase.core.errors import BackendUnusable, HandleReleased, PeerLost, PolyphaseError, StaleDescriptor, TransferError, TransferTimeout
from polyphase.transfer.backends.interface import Job, Link
from polyphase.transfer.reactor import Timer
from polyphase.transfer.verdicts import Outcome, Verdict

if TYPE_CHECKING:
    from polyphase.transfer.region import Region
    from polyphase.transfer.session import Session

log = logging.getLogger(__name__)

_VERDICT_OF: list[tuple[type[Exception], Verdict]] = [
    (StaleDescriptor, Verdict.STALE),
    (TransferTimeout, Verdict.LATE),
    (PeerLost, Verdict.LOST),
]


class Lane:
    """One job and who performs it: the first to claim it, an agent's thread or the one that waits."""

    __slots__ = ("_claim", "job")

    def __init__(self, job: Job) -> None:
        self.job = job
        self._claim = threading.Lock()

    def claim(self) -> bool:
        return self._claim.acquire(blocking=False)


class Transfer:
    """Posted by `Session.read` or `write`. Owner: the caller, by `with`, `release`, or by waiting for the end."""

    def __init__(
        self, session: Session, link: Link, lanes: list[Lane], verdicts: bytearray, *, is_read: bool, notify: bytes | None
    ) -> None:
        self._session = session
        self._link = link
        self._move = link.read if is_read else link.write
        self._lanes = lanes
        self._verdicts = verdicts
        self._notify = notify
        self._lock = threading.Lock()
        self._left = len(lanes)
        self._given_up: Verdict | None = None
        self._error: str | None = None
        self._begun_ns = session.agent.clock.now_ns()
        self._future: Future[Outcome] = Future()
        self._is_released = False
        self._timer: Timer | None = None

    def poll(self) -> bool:
        """Whether it has ended. Raises: HandleReleased."""
        self._check()
        return self._future.done()

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None as long as it has not. Raises: HandleReleased."""
        self._check()
        return self._future.result() if self._future.done() else None

    def wait(self, timeout_s: float | None = None) -> Outcome:
        """Until it ends; what nobody has begun yet is done on this very thread.

        Raises: TransferTimeout if it has not ended after `timeout_s`, and goes on; HandleReleased.
        """
        self._check()
        if timeout_s is None:
            for lane in self._lanes:
                self.perform(lane)
        try:
            self._session.agent.runtime.wait(self._future, timeout_s)
        except TimeoutError:
            raise TransferTimeout(f"the transfer has not ended within {timeout_s} s; it goes on") from None
        return self._future.result()

    def __await__(self) -> Generator[Any, None, Outcome]:
        """On an event loop. Cancel: the transfer goes on; `cancel` or `release` ends it."""
        self._check()
        return asyncio.wrap_future(self._future).__await__()

    def cancel(self) -> None:
        """Give it up; it ends soon. Idempotent, also after the end. Raises: HandleReleased."""
        self._check()
        self.give_up(Verdict.CANCELLED)

    def release(self) -> None:
        """Give it up if it runs and return when nobody writes any more. Raises: HandleReleased the second time."""
        self._check()
        self.give_up(Verdict.CANCELLED)
        self.join()
        self._is_released = True

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._is_released:
            self.release()

    def _check(self) -> None:
        if self._is_released:
            raise HandleReleased("this transfer was released before")

    # What the agent calls.

    def arm(self) -> None:
        """From now on the deadline holds."""
        timer = self._session.agent.runtime.call_at(self._lanes[0].job.deadline_ns, lambda: self.give_up(Verdict.LATE))
        self._timer = timer
        if self._future.done():
            timer.cancel()

    def perform(self, lane: Lane) -> None:
        """Move the blocks of one lane, unless somebody else does."""
        if not lane.claim():
            return
        job = lane.job
        error: PolyphaseError | None = None
        try:
            if self._given_up is None:
                job.local.enter(job)
                try:
                    self._move(job)
                finally:
                    job.local.leave(job)
        except BackendUnusable as failure:
            self._session.exclude(self._link, failure.message)
            error = failure
        except PolyphaseError as failure:
            error = failure
        except Exception as failure:  # a backend may be anybody's: whatever it was, the transfer ends
            log.exception("a backend failed while it moved blocks")
            error = TransferError(f"the backend failed: {failure!r}")
        self._settle(job, error)

    def _settle(self, job: Job, error: PolyphaseError | None) -> None:
        if error is not None:
            self._error = self._error or error.message
        rest = self._given_up
        if rest is None:
            rest = next((verdict for kind, verdict in _VERDICT_OF if isinstance(error, kind)), Verdict.REFUSED)
        found = job.verdicts.tobytes()
        if Verdict.PENDING in found:
            job.verdicts[:] = found.replace(bytes([Verdict.PENDING]), bytes([rest]))
        with self._lock:
            self._left -= 1
            has_ended = self._left == 0
        if has_ended:
            self._end()

    def give_up(self, why: Verdict) -> None:
        """The deadline, the caller or the end of the memory: running lanes stop soon, the others are not begun."""
        with self._lock:
            if self._left == 0 or self._given_up is not None:
                return
            self._given_up = why
        for lane in self._lanes:
            lane.job.stop[0] = 1
            if (wake := lane.job.on_stop) is not None:
                wake()
        for lane in self._lanes:
            self.perform(lane)

    def join(self) -> None:
        """Until it has ended; for those who have given it up."""
        self._session.agent.runtime.wait(self._future, None)

    def uses(self, region: Region) -> bool:
        return self._lanes[0].job.local is region

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._session.forget(self)
        duration_ns = self._session.agent.clock.now_ns() - self._begun_ns
        good = self._verdicts.count(Verdict.DONE)
        width = self._lanes[0].job.remote.block_bytes
        outcome = Outcome(bytes(self._verdicts), good * width, duration_ns, self._error)
        if outcome.is_done and self._notify is not None:
            with contextlib.suppress(TransferError):  # a dead peer's end of the transfer does not spoil ours
                self._session.notify(self._notify)
        self._future.set_result(outcome)
