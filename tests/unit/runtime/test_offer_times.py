"""An offer goes from a worker by a frontend to another worker, each with a clock of its own, and ends at about the same moment for all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from polyphase.core.clock import ManualClock
from polyphase.runtime import PeerId, WorkerClient, WorkerServer
from polyphase.wire.kv import KvOffer
from polyphase.wire.offer_times import MARGIN_NS, for_frontend, for_worker, from_frontend, from_worker
from polyphase.wire.requests import Cancel, FromWorker, SamplingParams, SequenceOutput, StepOutputs, StopConditions, Submit, ToWorker
from polyphase.wire.transfer import AgentCard
from tests.unit.runtime.test_channel import running
from tests.unit.runtime.waiting import eventually

AGENT = AgentCard("p", 1, "there", 0, "", "10.0.0.5:7", False, [])
LEASE_NS = 30_000_000_000


def offer(expires_at_ns: int) -> KvOffer:
    return KvOffer("p", 1, "ipc://p", "lease", expires_at_ns, AGENT, "pool", [0], [1], 16)


def submit(of: KvOffer | None) -> Submit:
    return Submit(
        request_id="r", token_ids=[1], prompt_token_count=1, sampling=SamplingParams(seed=1), stop=StopConditions(max_tokens=1), offer=of
    )


def test_clocks_that_have_nothing_in_common(tmp_path: Path) -> None:
    async def exchange() -> None:
        at_worker, at_frontend = ManualClock(9_000_000_000_000), ManualClock(5)
        endpoint = f"ipc://{tmp_path}/w"
        submits: list[ToWorker] = []
        found: list[StepOutputs] = []
        peers: list[PeerId] = []

        def handle(peer: PeerId, message: ToWorker) -> None:
            peers.append(peer)
            submits.append(message)

        server = WorkerServer(endpoint, handle, at_worker)
        client = WorkerClient(found.append, clock=at_frontend)
        try:
            async with running(server, client):
                client.connect("w", endpoint)
                client.send("w", submit(offer(at_frontend.now_ns() + LEASE_NS)))
                await eventually(lambda: bool(submits))
                [there] = submits
                assert isinstance(there, Submit)
                assert there.offer is not None
                assert there.offer.expires_at_ns == at_worker.now_ns() + LEASE_NS - MARGIN_NS
                plain = SequenceOutput(request_id="q", token_ids=[4])
                server.send(peers[0], StepOutputs("w", 1, 1, [plain, SequenceOutput(request_id="r", offer=there.offer)]))
                await eventually(lambda: bool(found))
                assert found[0].outputs[0] == plain
                back = found[0].outputs[1].offer
                assert back is not None
                assert back.expires_at_ns == at_frontend.now_ns() + LEASE_NS - 2 * MARGIN_NS
                assert msgspec.structs.replace(back, expires_at_ns=0) == offer(0)
        finally:
            client.close()
            server.close()

    asyncio.run(exchange())


def test_an_offer_that_has_ended_stays_ended() -> None:
    sent = for_worker(submit(offer(100)), 200)
    assert isinstance(sent, Submit)
    assert sent.offer is not None
    assert sent.offer.expires_at_ns == -100
    received = from_frontend(sent, 10**12)
    assert isinstance(received, Submit)
    assert received.offer is not None
    assert received.offer.expires_at_ns < 10**12


def test_messages_without_an_offer_are_left_alone() -> None:
    for message in (submit(None), Cancel("r")):
        assert from_frontend(for_worker(message, 5), 7) is message
    outputs: FromWorker = StepOutputs("w", 1, 1, [SequenceOutput(request_id="r", token_ids=[1])])
    assert from_worker(for_frontend(outputs, 5), 7) is outputs
