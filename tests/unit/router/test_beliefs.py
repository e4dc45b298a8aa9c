"""Workers whose events are not to be had, or not wanted: what was sent there is believed to be there, for a while."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router import IndexSettings, Router, RouterSettings
from polyphase.wire.events import BlocksStored
from tests.unit.router.builders import facts, prefix, request

SECOND = 10**9
TOLD, SILENT = WorkerId("told"), WorkerId("silent")


def mixed(settings: IndexSettings | None = None) -> Router:
    router = Router(RouterSettings(index=settings or IndexSettings()))
    router.upsert_worker(facts(TOLD))
    router.upsert_worker(replace(facts(SILENT), publishes_events=False))
    return router


def send(router: Router, request_id: str, name: int, now_ns: int, to: WorkerId) -> None:
    others = [worker for worker in (TOLD, SILENT) if worker != to]
    router.route(replace(request(request_id, prefix(name, 8), excluded=tuple(others)), now_ns=now_ns))
    router.mark_prefill_done(request_id)  # type: ignore[arg-type]
    router.release(request_id)  # type: ignore[arg-type]


def overlap(router: Router, name: int, worker: WorkerId) -> int:
    return router.index.match(prefix(name, 8)).depth(worker)


def test_only_the_silent_one_is_believed_to_hold_what_was_sent_there():
    router = mixed()
    send(router, "a", 1, 0, SILENT)
    send(router, "b", 2, 0, TOLD)
    assert [overlap(router, 1, SILENT), overlap(router, 2, TOLD)] == [8, 0]
    router.apply(TOLD, Epoch(1), [BlocksStored(list(prefix(2, 8)))])
    assert overlap(router, 2, TOLD) == 8
    placement = router.route(request("c", prefix(1, 8))).decode
    assert (placement.worker_id, placement.overlap_block_count > 0) == (SILENT, True)
    assert router.index_fill().believed_block_count == 8


def test_beliefs_end_with_time_and_what_is_told_does_not():
    router = mixed(IndexSettings(predicted_lifetime_ns=10 * SECOND))
    send(router, "a", 1, 0, SILENT)
    router.apply(TOLD, Epoch(1), [BlocksStored(list(prefix(1, 8)))])
    send(router, "b", 3, 9 * SECOND, TOLD)
    assert overlap(router, 1, SILENT) == 8
    send(router, "c", 3, 10 * SECOND, TOLD)
    assert [overlap(router, 1, SILENT), overlap(router, 1, TOLD)] == [0, 8]
    assert router.index_fill().believed_block_count == 0


def test_what_a_silent_worker_tells_after_all_is_not_believed():
    router = mixed()
    router.apply(SILENT, Epoch(1), [BlocksStored(list(prefix(4, 8)))])
    router.add_blocks(SILENT, Epoch(1), prefix(4, 8))
    assert overlap(router, 4, SILENT) == 0
    assert router.digests(SILENT, Epoch(1)) is None
    assert router.digests(TOLD, Epoch(1)) == {}


def test_events_can_be_switched_off_for_all():
    router = mixed(IndexSettings(follows_events=False))
    router.apply(TOLD, Epoch(1), [BlocksStored(list(prefix(2, 8)))])
    assert overlap(router, 2, TOLD) == 0
    send(router, "a", 2, 0, TOLD)
    assert overlap(router, 2, TOLD) == 8


def test_a_new_life_of_a_silent_worker_holds_nothing():
    router = mixed()
    send(router, "a", 1, 0, SILENT)
    router.upsert_worker(replace(facts(SILENT, epoch=2), publishes_events=False))
    assert overlap(router, 1, SILENT) == 0
    send(router, "b", 1, 5, SILENT)
    assert overlap(router, 1, SILENT) == 8
    router.remove_worker(SILENT)
    assert router.index_fill().block_count == 0


@pytest.mark.parametrize("capacity", [16, 100])
def test_the_index_is_as_large_as_it_is_set(capacity: int):
    router = mixed(IndexSettings(capacity=capacity))
    for number in range(30):
        send(router, f"r{number}", number, number, SILENT)
    fill = router.index_fill()
    assert fill.capacity == capacity
    assert 0 < fill.block_count <= capacity
    assert fill.forgotten_block_count > 0
    assert fill.heap_bytes > 0
