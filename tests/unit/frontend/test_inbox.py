from __future__ import annotations

import asyncio

from polyphase.frontend.inbox import Arrival, End, Inbox
from polyphase.wire.requests import FinishReason


async def test_what_comes_while_nobody_looks_is_merged_per_sequence() -> None:
    inbox = Inbox()
    inbox.put(Arrival(0, [1]))
    inbox.put(Arrival(1, [7]))
    inbox.put(Arrival(0, [2, 3]))
    inbox.put(Arrival(0, [4], end=End(FinishReason.LENGTH)))
    first, second = await inbox.take()
    assert (first.index, first.token_ids, first.end) == (0, [1, 2, 3, 4], End(FinishReason.LENGTH))
    assert (second.index, second.token_ids, second.end) == (1, [7], None)


async def test_taking_waits_and_can_be_cancelled() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    inbox.put(Arrival(0, [1]))
    again = asyncio.create_task(inbox.take())
    assert [arrival.token_ids for arrival in await again] == [[1]]
    late = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(Arrival(0, [2]))
    inbox.put(Arrival(0, [3]))
    assert [arrival.token_ids for arrival in await late] == [[2, 3]]


async def test_many_small_arrivals_merge_in_linear_time() -> None:
    """A client that reads nothing for a long answer: merging must not copy what is there for each token."""
    inbox = Inbox()
    first = Arrival(0, [0])
    inbox.put(first)
    kept = first.token_ids
    for token_id in range(1, 1000):
        inbox.put(Arrival(0, [token_id]))
    [arrival] = await inbox.take()
    assert arrival.token_ids is kept
    assert arrival.token_ids == list(range(1000))
