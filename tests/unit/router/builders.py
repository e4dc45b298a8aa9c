"""Workers and requests for the router's tests, with defaults that a test overrides where it matters."""

from __future__ import annotations

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import Router, RouteRequest, RouterSettings, SplitRule, WorkerFacts
from polyphase.wire.cards import Role

BLOCK_SIZE = 16


def facts(
    worker_id: str,
    role: Role = Role.BOTH,
    *,
    epoch: int = 1,
    model: str = "demo",
    block_count: int = 1000,
    max_running: int = 64,
    can_hand_over: bool = True,
    is_draining: bool = False,
) -> WorkerFacts:
    return WorkerFacts(
        worker_id=WorkerId(worker_id),
        epoch=Epoch(epoch),
        model=model,
        role=role,
        block_size=BLOCK_SIZE,
        block_count=block_count,
        max_batch_tokens=512,
        max_running=max_running,
        can_hand_over=can_hand_over,
        is_draining=is_draining,
    )


def prefix(name: int, block_count: int) -> list[SequenceHash]:
    """Sequence hashes of a prompt; prompts of different names have no block in common."""
    return [SequenceHash(name * 1_000_000 + position) for position in range(block_count)]


def request(
    request_id: str = "r",
    hashes: list[SequenceHash] | None = None,
    *,
    tokens: int | None = None,
    model: str = "demo",
    output: int = 16,
    excluded: tuple[str, ...] = (),
) -> RouteRequest:
    hashes = prefix(1, 64) if hashes is None else hashes
    return RouteRequest(
        request_id=RequestId(request_id),
        model=model,
        sequence_hashes=hashes,
        prompt_token_count=len(hashes) * BLOCK_SIZE if tokens is None else tokens,
        max_output_tokens=output,
        excluded=frozenset(map(WorkerId, excluded)),
    )


def router_with(*workers: WorkerFacts, policy: str = "kv", split: SplitRule | None = None, max_waiting_requests: int = 1024) -> Router:
    router = Router(RouterSettings(policy=policy, split=split or SplitRule(), max_waiting_requests=max_waiting_requests))
    for worker in workers:
        router.upsert_worker(worker)
    return router
