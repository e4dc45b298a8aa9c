"""Random histories: requests with common prefixes come, are cancelled, handed over and preempted; each answer is still the right one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import FinishReason
from tests.unit.engine.agents import AgentPair
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

COUNT = 24


@pytest.mark.parametrize("seed", range(3))
def test_any_history_gives_the_right_tokens(seed: int, make_engine: Callable[..., TorchEngine], peer_of: Callable[[str], Peer]) -> None:
    rng = random.Random(seed)
    base = prompt_of(90)
    prompts = [base[:20], base[:50], base, base[:33] + prompt_of(20, 1), prompt_of(60, 2), prompt_of(5, 3)]
    wanted = [peer_of("llama").greedy(prompt, COUNT) for prompt in prompts]
    prefill = make_engine(kv_bytes=20 * 8192, max_batch_tokens=24, max_running=4, lease_s=1000)
    decode = make_engine(kv_bytes=16 * 8192, max_batch_tokens=24, max_running=6)
    agents = AgentPair(prefill, decode)
    source = agents.source
    prefilled, decoded, chosen = Answers(), Answers(), dict[str, int]()
    offers: dict[str, KvOffer] = {}
    for turn in range(160):
        if turn < 120 and rng.random() < 0.3:
            name, which = f"r{turn}", rng.randrange(len(prompts))
            chosen[name] = which
            prefill.submit(submit(name, prompts[which], COUNT, hand_over=True))
        if chosen and rng.random() < 0.08:
            victim = rng.choice(list(chosen))
            rng.choice([prefill, decode]).abort(victim)
        for engine, answers in ((prefill, prefilled), (decode, decoded)):
            report = engine.step()
            if report is None:
                continue
            answers.add(report)
            for offer in report.released_offers:
                prefill.release_lease(offer.lease_id)
            for output in report.outputs if engine is prefill else []:
                if output.offer is not None:
                    offers[output.request_id] = output.offer
                    request = submit(
                        output.request_id, prompts[chosen[output.request_id]], COUNT, emitted=list(output.token_ids), offer=output.offer
                    )
                    decode.submit(request, source)
    for engine, answers in ((prefill, prefilled), (decode, decoded)):
        run_all(engine, answers)
    for offer in offers.values():
        prefill.release_lease(offer.lease_id)
    assert decode.load().preemptions_total > 0
    completed = 0
    for name, which in chosen.items():
        ended = decoded if name in decoded.outputs else prefilled
        tokens = prefilled.tokens(name) + decoded.tokens(name)
        assert tokens == wanted[which][: len(tokens)]
        reason = ended.reason(name)
        if reason is not FinishReason.CANCELLED:
            assert tokens == wanted[which] or reason is FinishReason.HANDED_OVER
            completed += tokens == wanted[which]
    assert completed > 10
    for engine in (prefill, decode):
        assert_nothing_held(engine)
    agents.close()
