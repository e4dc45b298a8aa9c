"""What of the `cuda` backend can be told without a device: it says why it is not there, and its copies are right."""

from __future__ import annotations

import random

import pytest
import torch

from polyphase.core.errors import ConfigurationError, ForeignDescriptor
from polyphase.transfer import Agent, device
from polyphase.transfer.backends.cuda import CudaBackend
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend
from polyphase.transfer.device import CudaMemory, copy_rows
from polyphase.wire.transfer import AgentCard, BackendCard


def test_where_there_is_no_device_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Agent("a", backends=[CudaBackend(), TcpBackend()]) as a, Agent("b", backends=[TcpBackend()]) as b:
        assert a.unavailable == {"cuda": "there is no CUDA device here that torch can use"}
        with a.connect(b.card) as session:
            assert "cuda: not possible: there is no CUDA device here that torch can use" in session.why()
    refused = pytest.raises(ForeignDescriptor, match="no backend of this agent moves cuda memory")
    with Agent("a", backends=[CudaBackend(), ShmBackend()]) as a, refused:  # tcp would take it through the host
        a.register(CudaMemory(torch.zeros(8, dtype=torch.uint8), 4))


@pytest.mark.parametrize("threshold", [1, 1 << 20])
def test_rows_go_where_they_should(threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SINGLE_FROM_BYTES", threshold)
    source, target = CudaMemory(torch.arange(40, dtype=torch.float32), 16), CudaMemory(torch.zeros(60, dtype=torch.float32), 16)
    sources, targets = random.Random(1).sample(range(10), 7), random.Random(2).sample(range(15), 7)
    copy_rows(torch, source.rows, sources, target.rows, targets)
    for source_id, target_id in zip(sources, targets, strict=True):
        assert torch.equal(target.rows[target_id], source.rows[source_id])
    assert int((target.rows.sum(1) > 0).sum()) <= 7


def test_memory_is_whole_blocks() -> None:
    memory = CudaMemory(torch.zeros(6, 4), 32)
    memory.renew([1])
    assert (memory.block_count, memory.generations([0, 1])) == (3, [1, 2])
    with pytest.raises(ConfigurationError, match="no whole number of blocks"):
        CudaMemory(torch.zeros(5), 8)
    with pytest.raises(ConfigurationError, match="contiguous"):
        CudaMemory(torch.zeros(4, 4).t()[1:], 4)


def test_who_can_share_device_memory(tmp_path: object) -> None:
    def card(**changes: object) -> AgentCard:
        facts = {"torch": "2.13", "devices": "x,y", **{k: v for k, v in changes.items() if k in ("torch", "devices")}}
        return AgentCard("a", 1, str(changes.get("host", "h")), 0, "/", "", False, [BackendCard("cuda", facts)])  # type: ignore[arg-type]

    judge = CudaBackend().judge
    assert judge(card(), card()).rank == 100
    assert judge(card(), card(devices="y")).rank == 100
    for changes, reason in (
        ({"host": "g"}, "another host"),
        ({"torch": "2.8"}, "torch is 2.13 here and 2.8 there"),
        ({"devices": "x,z"}, "cannot be seen here: z"),
    ):
        found = judge(card(), card(**changes))
        assert found.rank is None
        assert reason in found.reason
