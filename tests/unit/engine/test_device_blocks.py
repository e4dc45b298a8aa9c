"""Engines whose blocks lie in device memory, which the processor's poses as: offers, pulls, and when others may read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyphase.engines.torch import assembly
from polyphase.engines.torch.engine import TorchEngine
from polyphase.engines.torch.storage import DeviceStorage
from polyphase.transfer.agent import default_backends
from polyphase.transfer.backends.interface import Backend
from polyphase.wire.kv import KvLayout
from polyphase.wire.requests import FinishReason
from tests.unit.engine.agents import AgentPair
from tests.unit.engine.tiny import Peer, assert_nothing_held, prompt_of, run_all, submit
from tests.unit.transfer.posing import posing_backend

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]


@pytest.fixture
def make_device_engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    def storage(layout: KvLayout, block_count: int) -> DeviceStorage:
        return DeviceStorage(layout, block_count, torch.device("cpu"))

    def make(**changes: int) -> TorchEngine:
        with monkeypatch.context() as patched:
            patched.setattr(assembly, "HostStorage", storage)
            return make_engine(**changes)

    return make


def with_cuda() -> list[Backend]:
    return [posing_backend(), *default_backends()]


@pytest.fixture(params=[(with_cuda, "cuda"), (default_backends, "tcp")], ids=["cuda", "through-the-host"])
def way(request: pytest.FixtureRequest) -> tuple[Callable[[], list[Backend]], str]:
    found: tuple[Callable[[], list[Backend]], str] = request.param
    return found


@pytest.mark.parametrize("length", [15, 16, 600])
def test_tokens_equal_those_of_one_engine(
    length: int, way: tuple[Callable[[], list[Backend]], str], make_device_engine: MakeEngine, peer_of: PeerOf
) -> None:
    prefill, decode = make_device_engine(), make_device_engine()
    assert prefill.card.can_hand_over
    assert prefill.kv_memory.kind == "cuda"
    pair, (_, backend) = AgentPair(prefill, decode, way[0]), way
    prompt = prompt_of(length)
    prefill.submit(submit("a", prompt, 8, hand_over=True))
    prefilled = run_all(prefill)
    end = prefilled.end("a")
    assert end.finish_reason is FinishReason.HANDED_OVER
    assert end.offer is not None
    region = end.offer.agent.region(end.offer.region_id)
    assert region is not None
    assert region.backends[0] == backend
    decode.submit(submit("a", prompt, 8, emitted=prefilled.tokens("a"), offer=end.offer), pair.source)
    answers = run_all(decode)
    assert [*prefilled.tokens("a"), *answers.tokens("a")] == peer_of("llama").greedy(prompt, 8)
    assert answers.stats("a").transferred_token_count == length
    prefill.release_lease(end.offer.lease_id)
    for engine in (prefill, decode):
        assert_nothing_held(engine)
    pair.close()


def test_a_device_and_a_host_exchange_blocks(make_device_engine: MakeEngine, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    for prefill, decode in ((make_device_engine(), make_engine()), (make_engine(), make_device_engine())):
        pair = AgentPair(prefill, decode, with_cuda)
        prompt = prompt_of(100)
        prefill.submit(submit("a", prompt, 5, hand_over=True))
        prefilled = run_all(prefill)
        decode.submit(submit("a", prompt, 5, emitted=prefilled.tokens("a"), offer=prefilled.end("a").offer), pair.source)
        answers = run_all(decode)
        assert [*prefilled.tokens("a"), *answers.tokens("a")] == peer_of("llama").greedy(prompt, 5)
        assert answers.stats("a").transferred_token_count == 100
        pair.close()


def test_every_step_waits_for_the_device(make_device_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the steps of a long prompt, which sample nothing: their blocks are shown while the prompt goes on."""
    engine = make_device_engine()
    waits: list[str] = []
    monkeypatch.setattr(engine._storage, "settle", lambda: waits.append("waited"))
    engine.submit(submit("a", prompt_of(600), 3))
    answers = run_all(engine)
    assert len(waits) == len(answers.reports)
    assert len(waits) >= 5  # 3 chunks of at most 256 tokens, then 2 tokens


def test_what_a_device_reports_late_ends_the_requests_of_the_step(make_device_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_device_engine()

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(engine._storage, "settle", fail)
        engine.submit(submit("a", prompt_of(20), 3))
        assert run_all(engine).end("a").finish_reason is FinishReason.ERROR
    assert_nothing_held(engine)
    engine.submit(submit("b", prompt_of(20), 3))
    assert len(run_all(engine).tokens("b")) == 3
