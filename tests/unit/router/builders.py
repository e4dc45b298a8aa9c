"""Workers and requests for the router's tests, with defaults that a test overrides where it matters."""

from __future__ import annotations

import itertools

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import PolicySettings, Router, RouteRequest, RouterSettings, SplitRule, WorkerFacts, WorkerView
from polyphase.wire.cards import BLOCKS, Role
from polyphase.wire.events import Load

BLOCK_SIZE = 16
NUMBERS = itertools.count()


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
    labels: dict[str, str] | None = None,
    offer_kind: str = BLOCKS,
    offer_facts: dict[str, str] | None = None,
    takes_grammars: bool = False,
    resumes_grammars: bool | None = None,
    serves_whole: bool = True,
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
        labels=labels or {},
        offer_kind=offer_kind,
        offer_facts=offer_facts or {},
        takes_grammars=takes_grammars,
        resumes_grammars=takes_grammars if resumes_grammars is None else resumes_grammars,
        serves_whole=serves_whole,
    )


def view(
    name: str | None = None,
    *,
    overlap: int = 0,
    prefill: int = 0,
    blocks: int = 0,
    requests: int = 0,
    load: Load | None = None,
    block_count: int = 1000,
    labels: dict[str, str] | None = None,
) -> WorkerView:
    """A worker as a scorer sees it; without a name it gets a new one."""
    made = facts(name or f"w{next(NUMBERS)}", block_count=block_count, labels=labels)
    return WorkerView(made, load, overlap, prefill, blocks, requests)


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
    session: int | None = None,
    prefers: dict[str, str] | None = None,
    requires: dict[str, str] | None = None,
    now_s: float = 0.0,
    has_grammar: bool = False,
    is_begun: bool = False,
) -> RouteRequest:
    hashes = prefix(1, 64) if hashes is None else hashes
    return RouteRequest(
        request_id=RequestId(request_id),
        model=model,
        sequence_hashes=hashes,
        prompt_token_count=len(hashes) * BLOCK_SIZE if tokens is None else tokens,
        max_output_tokens=output,
        excluded=frozenset(map(WorkerId, excluded)),
        now_ns=int(now_s * 1e9),
        session=session,
        preferred_labels=prefers or {},
        required_labels=requires or {},
        has_grammar=has_grammar,
        is_begun=is_begun,
    )


def router_with(*workers: WorkerFacts, policy: str = "kv", split: SplitRule | None = None, max_waiting_requests: int = 1024) -> Router:
    router = Router(RouterSettings(policy=PolicySettings(policy), split=split or SplitRule(), max_waiting_requests=max_waiting_requests))
    for worker in workers:
        router.upsert_worker(worker)
    return router
