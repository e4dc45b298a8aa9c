"""A worker changes its role while it serves, hands over what it is asked for, and refuses what was meant for its earlier role."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest

from polyphase.core.errors import ConfigurationError, RoleChanged
from polyphase.runtime import Registry
from polyphase.wire.cards import Role, WorkerEntry, WorkerStatus
from polyphase.wire.requests import Drain, FinishReason, HandOver, Question, SamplingParams, StopConditions, Submit
from polyphase.worker.roles import refuse_misdirected, takes, why_not_switch
from tests.unit.runtime.waiting import eventually
from tests.unit.worker.conftest import HostStarter
from tests.unit.worker.fake_engine import CRASH_ON_SUBMIT, NEVER_ANSWER, FakeEngine, expected_tokens
from tests.unit.worker.peer import Peer


def request(*, hand_over: bool = False, for_role: Role | None = None) -> Submit:
    sampling, stop = SamplingParams(seed=1), StopConditions(max_tokens=3)
    return Submit(request_id="r", token_ids=[1], prompt_token_count=1, sampling=sampling, stop=stop, hand_over=hand_over, for_role=for_role)


@pytest.mark.parametrize("hand_over", [False, True])
@pytest.mark.parametrize("known", [None, *Role])
@pytest.mark.parametrize("role", list(Role))
def test_only_what_was_meant_for_another_role_is_refused(role: Role, known: Role | None, hand_over: bool) -> None:
    entry = entry_of(role)
    is_refused = known not in (None, role) and not takes(role, wants_hand_over=hand_over)
    assert is_refused == (known is not None and known is not role and role is not Role.BOTH and hand_over == (role is Role.DECODE))
    expectation = pytest.raises(RoleChanged) if is_refused else contextlib.nullcontext()
    with expectation:
        refuse_misdirected(request(hand_over=hand_over, for_role=known), entry)


def entry_of(role: Role) -> WorkerEntry:
    return WorkerEntry(worker_id="w", epoch=1, role=role, model="m", pid=1, host="h", request_endpoint="r", event_endpoint="e")


async def test_the_registry_shows_the_new_role_and_what_runs_goes_on(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host(step_s=0.01)
    peer.connect(hosted.entry)
    running = peer.submit("w", [1, 2], max_tokens=60)
    await eventually(lambda: peer.tokens(running))
    status = await peer.client.switch_role("w", Role.PREFILL)
    assert status.entry.role is Role.PREFILL
    assert status.misplaced_count == 1
    assert [entry.role for entry in Registry(run_folder).entries()] == [Role.PREFILL]
    assert Registry(run_folder).entries()[0].epoch == hosted.entry.epoch
    assert (await peer.last(running)).finish_reason is FinishReason.LENGTH
    assert peer.tokens(running) == expected_tokens([1, 2], 60)
    status = await peer.client.ask("w", Question.STATUS)
    assert isinstance(status, WorkerStatus)
    assert status.misplaced_count == 0


async def test_a_submit_for_the_role_before_is_refused_and_keeps_its_offer(start_host: HostStarter, peer: Peer) -> None:
    prefill, decode = start_host("p"), start_host("d")
    peer.connect(prefill.entry)
    peer.connect(decode.entry)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    await peer.client.switch_role("d", Role.DECODE)
    await peer.client.switch_role("d", Role.PREFILL)
    submit = Submit(
        request_id="late",
        token_ids=[*range(9), *last.token_ids],
        prompt_token_count=9,
        sampling=SamplingParams(seed=1, temperature=0),
        stop=StopConditions(max_tokens=5),
        offer=last.offer,
        for_role=Role.DECODE,
    )
    peer.client.send("d", submit)
    refused = await peer.last("late")
    assert refused.failure is not None
    assert (refused.failure.code, refused.failure.is_retryable) == ("role_changed", True)
    assert prefill.engine.leases, "the peer takes the offer elsewhere"
    fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
    peer.client.send("d", Submit(**{**fields, "request_id": "again", "for_role": Role.PREFILL}))  # it knows, and has nobody else
    await peer.last("again")
    assert last.token_ids + peer.tokens("again") == expected_tokens(list(range(9)), 5)
    await eventually(lambda: not prefill.engine.leases)


async def test_a_request_hops_to_another_worker_with_its_blocks(start_host: HostStarter, peer: Peer) -> None:
    one, two = start_host("one", step_s=0.005), start_host("two", step_s=0.005)
    peer.connect(one.entry)
    peer.connect(two.entry)
    prompt = list(range(9))
    first = peer.submit("one", prompt, max_tokens=100)
    await eventually(lambda: len(peer.tokens(first)) >= 10)
    async with Peer() as stranger:
        stranger.connect(one.entry)
        stranger.client.send("one", HandOver(first))
        await stranger.client.ask("one", Question.STATUS)
    peer.client.send("one", HandOver(first))
    peer.client.send("one", HandOver("unknown"))
    last = await peer.last(first)
    assert last.finish_reason is FinishReason.HANDED_OVER
    assert last.offer is not None
    emitted = peer.tokens(first)
    second = peer.submit("two", prompt + emitted, max_tokens=100, emitted=len(emitted), offer=last.offer)
    await peer.last(second)
    assert emitted + peer.tokens(second) == expected_tokens(prompt, 100)
    stats = peer.outputs[second][0].stats
    assert stats is not None
    assert stats.transferred_token_count >= 16
    await eventually(lambda: not one.engine.leases)


async def test_what_still_opens_a_pool_gives_its_offer_back(start_host: HostStarter, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = start_host("p"), start_host("d")
    peer.connect(prefill.entry)
    peer.connect(decode.entry)

    async def never(offer: object) -> None:
        await asyncio.sleep(600)

    monkeypatch.setattr(decode.host._sources, "open", never)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    request_id = peer.submit("d", [*range(9), *last.token_ids], offer=last.offer, emitted=1)
    peer.client.send("d", HandOver(request_id))
    back = await peer.last(request_id)
    assert back.finish_reason is FinishReason.HANDED_OVER
    assert back.offer is not None
    assert last.offer is not None
    assert back.offer.expires_at_ns < last.offer.expires_at_ns  # a margin for each way
    assert msgspec.structs.replace(back.offer, expires_at_ns=last.offer.expires_at_ns) == last.offer
    assert prefill.engine.leases
    assert len(decode.host._live) == 0


async def test_an_unread_offer_goes_on_as_it_came(start_host: HostStarter, peer: Peer) -> None:
    """Also to the worker that made it, after the one that it was for was lost: that one must not lend it a second time."""
    prefill, decode = start_host("p"), start_host("d")
    peer.connect(prefill.entry)
    peer.connect(decode.entry)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    assert last.offer is not None
    for place in ("d", "p"):
        request_id = peer.submit(place, [NEVER_ANSWER, *range(9)], offer=last.offer, emitted=1)
        hosted = decode if place == "d" else prefill
        await eventually(lambda hosted=hosted: hosted.engine.running)  # type: ignore[misc]
        peer.client.send(place, HandOver(request_id))
        back = await peer.last(request_id)
        assert back.finish_reason is FinishReason.HANDED_OVER
        assert back.offer is not None
        assert (back.offer.lease_id, back.offer.block_ids) == (last.offer.lease_id, last.offer.block_ids)
    assert last.offer.lease_id in prefill.agent.lending
    assert last.offer.lease_id not in decode.agent.lending
    assert prefill.engine.leases
    await peer.last(peer.submit("d", [*range(9), *last.token_ids], offer=last.offer, emitted=1))
    await eventually(lambda: not prefill.engine.leases)


async def test_what_cannot_be_is_denied_with_the_reason(
    start_host: HostStarter, peer: Peer, monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> None:
    hosted = start_host(step_s=0.02)
    peer.connect(hosted.entry)
    with monkeypatch.context() as patch:
        patch.setattr(hosted.host._lease, "update", _full_disk)
        with pytest.raises(ConfigurationError, match="keeps its role both: the registry cannot be told"):
            await peer.client.switch_role("w", Role.PREFILL)
    running = peer.submit("w", [1, 2], max_tokens=100)
    await eventually(lambda: peer.tokens(running))
    peer.client.send("w", Drain())
    with pytest.raises(ConfigurationError, match="is draining"):
        await peer.client.switch_role("w", Role.DECODE)
    assert [entry.role for entry in Registry(run_folder).entries()] == [Role.BOTH]
    assert (await peer.last(peer.submit("w", [CRASH_ON_SUBMIT]))).failure is not None


def _full_disk(entry: object) -> None:
    raise OSError(28, "No space left on device")


def test_an_engine_that_cannot_hand_over_is_no_prefill_worker() -> None:
    engine = FakeEngine()
    card = msgspec.structs.replace(engine.card, can_hand_over=False)
    assert "cannot be a prefill worker" in (why_not_switch(Role.PREFILL, entry_of(Role.BOTH), card) or "")
    assert why_not_switch(Role.DECODE, entry_of(Role.BOTH), card) is None
    half = msgspec.structs.replace(card, serves_whole=False)
    assert "was started to do this half only" in (why_not_switch(Role.BOTH, entry_of(Role.DECODE), half) or "")
    assert why_not_switch(Role.DECODE, entry_of(Role.DECODE), half) is None
    engine.close()
