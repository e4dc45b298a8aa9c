"""Requests that hop between engines at any moment, their blocks with them: the tokens of one engine, and nothing kept behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from polyphase.engines.interface import StepReport
from polyphase.engines.torch.engine import TorchEngine
from polyphase.engines.torch.execution import execute
from polyphase.transfer import Agent, PeerBlocks
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import FinishReason, SamplingParams, SequenceOutput
from tests.unit.engine.tiny import Peer, assert_nothing_held, prompt_of, submit

MakeEngine = Callable[..., TorchEngine]
COUNT = 20


class Places:
    """Engines that have opened each other's pools, and what each request has said so far."""

    def __init__(self, engines: dict[str, TorchEngine]) -> None:
        self.engines = engines
        self.agents = ExitStack()
        reader = self.agents.enter_context(Agent("reader", epoch=1))  # of every engine: it writes into each one's blocks
        self.sources: dict[str, PeerBlocks] = {}
        for engine in engines.values():
            reader.register(engine.kv_memory, engine.kv_layout)
        for name, engine in engines.items():
            lender = self.agents.enter_context(Agent(name, epoch=1))
            region = lender.register(engine.kv_memory, engine.kv_layout)
            card = lender.card_with(region.card)
            engine.bind_offers(worker_id=name, epoch=1, endpoint=name, agent=card, region_id=region.region_id)
            self.sources[name] = PeerBlocks(self.agents.enter_context(reader.connect(card)), region.card)
        self.prompts: dict[str, list[int]] = {}
        self.sampling: dict[str, SamplingParams | None] = {}
        self.emitted: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.place: dict[str, str] = {}
        self.transferred = 0
        self.hop_count = 0

    def start(self, name: str, prompt: list[int], place: str, *, hand_over: bool, sampling: SamplingParams | None = None) -> None:
        self.prompts[name], self.emitted[name], self.sampling[name] = prompt, [], sampling
        self.send(name, place, None, hand_over=hand_over)

    def send(self, name: str, place: str, offer: KvOffer | None, *, hand_over: bool = False) -> None:
        self.place[name] = place
        request = submit(
            name,
            self.prompts[name],
            COUNT,
            emitted=self.emitted[name],
            sampling=self.sampling[name],
            offer=offer,
            hand_over=hand_over,
        )
        self.engines[place].submit(request, self.sources[offer.worker_id] if offer else None)

    def take(self, place: str, report: StepReport, next_place: Callable[[str], str]) -> None:
        for offer in report.released_offers:
            self.engines[offer.worker_id].release_lease(offer.lease_id)
        for output in report.outputs:
            self._take_output(place, output, next_place)

    def _take_output(self, place: str, output: SequenceOutput, next_place: Callable[[str], str]) -> None:
        name = output.request_id
        assert self.place[name] == place, "said by an engine that no longer has it"
        assert name not in self.ended
        self.emitted[name] += output.token_ids
        if output.stats is not None:
            self.transferred += output.stats.transferred_token_count
        if output.finish_reason is FinishReason.HANDED_OVER:
            self.hop_count += 1
            self.send(name, next_place(name), output.offer)
        elif output.finish_reason is not None:
            self.ended[name] = output.finish_reason

    def close(self) -> None:
        self.agents.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_way_through_the_engines_gives_the_same_tokens(seed: int, make_engine: MakeEngine, peer_of: Callable[[str], Peer]) -> None:
    rng = random.Random(seed)
    engines = {name: make_engine(kv_bytes=24 * 8192, max_batch_tokens=24, max_running=5, lease_s=1000) for name in "abc"}
    places = Places(engines)
    base = prompt_of(90)
    prompts = [base[:20], base[:50], base, base[:33] + prompt_of(20, 1), prompt_of(60, 2), prompt_of(5, 3)]
    chosen: dict[str, int] = {}

    def next_place(name: str) -> str:
        return rng.choice("abc")  # the same one, now and then

    for turn in range(400):
        if turn < 100 and rng.random() < 0.3:
            name = f"r{turn}"
            chosen[name] = rng.randrange(len(prompts))
            places.start(name, prompts[chosen[name]], rng.choice("abc"), hand_over=rng.random() < 0.3)
        place = rng.choice("abc")
        engine = engines[place]
        if rng.random() < 0.2:
            engine.hand_over(rng.choice([*chosen, "unknown"]) if chosen else "unknown")
        plan = engine.core.begin_step()
        if plan.is_empty:
            report = engine.core.take_idle_report()
        else:
            if rng.random() < 0.2:
                for name in [name for name, where in places.place.items() if where == place][:3]:
                    engine.hand_over(name)  # while the step runs
            report = engine.core.finish_step(execute(plan, engine._storage, engine._runner), plan)
        if report is not None:
            places.take(place, report, next_place)
        for each in engines.values():
            each.core.pool.check_invariants()
    for _ in range(2000):
        reports = {place: report for place, engine in engines.items() if (report := engine.step()) is not None}
        for place, report in reports.items():
            places.take(place, report, next_place)
        if not reports and len(places.ended) == len(chosen):
            break
    assert places.ended == dict.fromkeys(chosen, FinishReason.LENGTH)
    wanted = [peer_of("llama").greedy(prompt, COUNT) for prompt in prompts]
    assert {name: places.emitted[name] for name in chosen} == {name: wanted[which] for name, which in chosen.items()}
    assert places.hop_count > 20
    assert places.transferred > 200
    for engine in engines.values():
        assert_nothing_held(engine)
    places.close()


def test_it_leaves_between_two_tokens_and_nothing_but_the_last_one_is_computed_again(
    make_engine: MakeEngine, peer_of: Callable[[str], Peer]
) -> None:
    engines = {"a": make_engine(), "b": make_engine()}
    places = Places(engines)
    prompt = prompt_of(100)
    places.start("r", prompt, "a", hand_over=False)
    for _ in range(4):
        report = engines["a"].step()
        assert report is not None
        places.take("a", report, lambda name: "b")
    engines["a"].hand_over("r")
    assert engines["a"].load().leased_block_count == 7
    report = engines["a"].step()
    assert report is not None
    [output] = report.outputs
    assert (output.token_ids, output.finish_reason) == ([], FinishReason.HANDED_OVER)
    assert output.offer is not None
    assert output.offer.token_count == 100 + 4 - 1
    places.take("a", report, lambda name: "b")
    computed_before = engines["b"].load().computed_tokens_total
    report = engines["b"].step()
    assert report is not None
    assert engines["b"].load().computed_tokens_total - computed_before == 1
    places.take("b", report, lambda name: "b")
    while (report := engines["b"].step()) is not None:
        places.take("b", report, lambda name: "b")
    assert places.emitted["r"] == peer_of("llama").greedy(prompt, COUNT)
    for engine in engines.values():
        assert_nothing_held(engine)
    places.close()


def test_seeds_and_penalties_survive_a_hop_in_the_middle(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(seed=11, temperature=0.9, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.3)
    answers = []
    for hops in (False, True):
        engines = {"a": make_engine(), "b": make_engine()}
        places = Places(engines)
        places.start("r", prompt_of(40), "a", hand_over=False, sampling=sampling)
        turn = 0
        while not places.ended:
            here = places.place["r"]
            if hops and turn % 3 == 2:
                engines[here].hand_over("r")
            report = engines[here].step()
            assert report is not None
            there = "b" if here == "a" else "a"
            places.take(here, report, lambda _, there=there: there)  # type: ignore[misc]
            turn += 1
        answers.append(places.emitted["r"])
        assert places.hop_count == 0 or hops
        places.close()
    assert answers[0] == answers[1]


def test_what_waits_with_an_unread_offer_takes_it_along(make_engine: MakeEngine) -> None:
    engines = {"a": make_engine(), "b": make_engine()}
    places = Places(engines)
    places.start("r", prompt_of(50), "a", hand_over=True)
    report = engines["a"].step()
    assert report is not None
    [handed] = report.outputs
    places.take("a", report, lambda name: "b")
    engines["b"].hand_over("r")
    report = engines["b"].step()
    assert report is not None
    assert [output.offer for output in report.outputs] == [handed.offer]
    assert report.released_offers == []
    places.take("b", report, lambda name: "b")
    while (report := engines["b"].step()) is not None:
        places.take("b", report, lambda name: "b")
    assert places.transferred == 50
    assert_nothing_held(engines["a"])
    places.close()


def test_a_prompt_that_is_being_computed_for_another_worker_is_finished_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16)
    places = Places({"a": engine})
    places.start("r", prompt_of(50), "a", hand_over=True)
    assert engine.step() is not None
    engine.hand_over("r")
    outputs = []
    while (report := engine.step()) is not None:
        outputs += report.outputs
    [output] = outputs
    assert output.finish_reason is FinishReason.HANDED_OVER
    assert len(output.token_ids) == 1
    assert output.offer is not None
    assert output.offer.token_count == 50
    places.close()


def test_an_engine_that_nobody_can_read_from_hands_over_without_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()  # never told what to write into offers
    engine.submit(submit("r", prompt_of(20), COUNT))
    assert engine.step() is not None
    engine.hand_over("r")
    report = engine.step()
    assert report is not None
    [output] = report.outputs
    assert (output.finish_reason, output.offer) == (FinishReason.HANDED_OVER, None)
    assert_nothing_held(engine)
