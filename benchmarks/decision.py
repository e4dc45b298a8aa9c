"""CPU of a whole routing decision: choose, book, end the prefill, release, for a prompt of 4,096 tokens that is hashed already.

Conversations of 256 blocks: 64 of a system prompt that every worker holds, 116 more that one worker holds, 76 new ones. As many other
requests as there are workers, 128 at most, wait for their first token, so that their prefixes are on their way. Every worker has
reported some load, and reports anew once in a hundred decisions. CPU time of the thread, median of rounds. Peer: Dynamo's KvRouter with
32 of its mockers, through its Python bindings, where it is installed; what it hashes itself is in its figure.
"""

from __future__ import annotations

import random
import statistics
import time

import peer
from harness import STDERR, Figure, arguments, report
from polyphase.core import native
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import Router, RouteRequest, RouterSettings, WorkerFacts
from polyphase.wire.cards import Role
from polyphase.wire.events import BlocksStored, Load

BLOCK_SIZE = 16
PROMPT_TOKENS = 4096
SYSTEM_BLOCKS = 64
KNOWN_BLOCKS = 180
CONVERSATIONS = 2000
MAX_WAITING = 128
E = Epoch(1)


def load(rng: random.Random) -> Load:
    return Load(running_count=3, used_block_count=rng.randrange(5000), waiting_prefill_tokens=rng.randrange(2000))


def facts(worker_id: WorkerId) -> WorkerFacts:
    return WorkerFacts(worker_id, E, "m", Role.BOTH, BLOCK_SIZE, 20_000, 8192, 256, can_hand_over=True)


def fleet(worker_count: int, rng: random.Random) -> tuple[Router, list[WorkerId], list[list[SequenceHash]]]:
    router = Router(RouterSettings())
    workers = [WorkerId(f"worker-{number}") for number in range(worker_count)]
    for worker_id in workers:
        router.upsert_worker(facts(worker_id))
        router.report_load(worker_id, E, load(rng))
    system = [SequenceHash(rng.getrandbits(64)) for _ in range(SYSTEM_BLOCKS)]
    rest = PROMPT_TOKENS // BLOCK_SIZE - SYSTEM_BLOCKS
    prompts = [system + [SequenceHash(rng.getrandbits(64)) for _ in range(rest)] for _ in range(CONVERSATIONS)]
    for number, prompt in enumerate(prompts):
        router.apply(workers[number % worker_count], E, [BlocksStored(list(prompt[:KNOWN_BLOCKS]))])
    return router, workers, prompts


def keep_busy(router: Router, prompts: list[list[SequenceHash]], rng: random.Random, count: int) -> None:
    """So many requests have no token yet."""
    for number in range(count):
        router.route(RouteRequest(RequestId(f"waiting-{number}"), "m", rng.choice(prompts), PROMPT_TOKENS, 512))


def decision_us(router: Router, workers: list[WorkerId], prompts: list[list[SequenceHash]], rng: random.Random, count: int) -> float:
    requests = [RouteRequest(RequestId(f"r{n}"), "m", rng.choice(prompts), PROMPT_TOKENS, 512) for n in range(count)]
    spent_ns = 0
    for start in range(0, count, 100):
        router.report_load(rng.choice(workers), E, load(rng))
        for request in requests[start : start + 100]:
            sum(request.sequence_hashes)  # just hashed, so warm
        began = time.thread_time_ns()
        for request in requests[start : start + 100]:
            router.route(request)
            router.mark_prefill_done(request.request_id)
            router.release(request.request_id)
        spent_ns += time.thread_time_ns() - began
    return spent_ns / count / 1e3


def measure(worker_count: int, rounds: int) -> float:
    rng = random.Random(worker_count)
    router, workers, prompts = fleet(worker_count, rng)
    waiting = min(worker_count, MAX_WAITING)
    keep_busy(router, prompts, rng, waiting)
    decision_us(router, workers, prompts, rng, 300)
    figure = statistics.median(decision_us(router, workers, prompts, rng, 500) for _ in range(rounds))
    for number in range(waiting):
        router.release(RequestId(f"waiting-{number}"))
    if not router.bookings.total().is_zero():
        raise RuntimeError("bookings are left over")
    return figure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    STDERR.print(native.status())
    peers = {} if options.no_peer else peer.figures("peer_decision.py", "32", "5", str(peer.home() / "model"))
    figures = {
        "decision_us_w32": Figure(measure(32, options.rounds), "us", "<= 40", peers.get("decision_w32")),
        "decision_us_w512": Figure(measure(512, options.rounds), "us", "<= 150"),
    }
    report("decision", figures, as_json=options.json)


if __name__ == "__main__":
    main()
