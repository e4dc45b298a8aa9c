"""A worker sleeps only when nothing runs there, takes nothing meanwhile, and can be woken at any moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.runtime import Registry
from polyphase.wire.requests import FinishReason
from tests.unit.runtime.waiting import eventually
from tests.unit.worker.conftest import HostStarter
from tests.unit.worker.peer import Peer


async def test_what_runs_ends_first_and_nothing_new_is_taken(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host(step_s=0.01)
    peer.connect(hosted.entry)
    running = peer.submit("w", [1, 2], max_tokens=30)
    await eventually(lambda: len(peer.tokens(running)) > 2)
    sleeping = asyncio.create_task(peer.client.switch_sleep("w", 30, is_asleep=True))
    await eventually(lambda: Registry(run_folder).entries()[0].is_asleep)
    refused = await peer.last(peer.submit("w", [3, 4]))
    assert refused.failure is not None
    assert (refused.failure.code, refused.failure.is_retryable) == ("draining", True)
    assert (await peer.last(running)).finish_reason is FinishReason.LENGTH
    assert (await sleeping).entry.is_asleep
    assert hosted.engine.is_asleep

    woken = await peer.client.switch_sleep("w", 30, is_asleep=False)
    assert not woken.entry.is_asleep
    assert not hosted.engine.is_asleep
    assert (await peer.last(peer.submit("w", [5, 6]))).finish_reason is FinishReason.LENGTH


async def test_it_can_be_woken_before_it_sleeps(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host(step_s=0.01)
    peer.connect(hosted.entry)
    running = peer.submit("w", [1, 2], max_tokens=150)
    await eventually(lambda: peer.tokens(running))
    sleeping = asyncio.create_task(peer.client.switch_sleep("w", 30, is_asleep=True))
    await eventually(lambda: Registry(run_folder).entries()[0].is_asleep)
    await peer.client.switch_sleep("w", 30, is_asleep=False)
    with pytest.raises(ConfigurationError, match="it was woken before it slept"):
        await sleeping
    assert not hosted.engine.is_asleep
    assert not Registry(run_folder).entries()[0].is_asleep
    assert (await peer.last(running)).finish_reason is FinishReason.LENGTH


async def test_an_engine_that_will_not_sleep_goes_on(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host()
    hosted.engine.will_not_sleep = True
    peer.connect(hosted.entry)
    with pytest.raises(ConfigurationError, match="worker w: it cannot sleep: no"):
        await peer.client.switch_sleep("w", 30, is_asleep=True)
    assert (await peer.last(peer.submit("w", [5, 6]))).finish_reason is FinishReason.LENGTH


async def test_to_sleep_twice_is_to_sleep(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host()
    peer.connect(hosted.entry)
    both = await asyncio.gather(*(peer.client.switch_sleep("w", 30, is_asleep=True) for _ in range(2)))
    assert all(status.entry.is_asleep for status in both)
    assert (await peer.client.switch_sleep("w", 30, is_asleep=True)).entry.is_asleep
    assert hosted.engine.is_asleep
