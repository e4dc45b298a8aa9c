"""Greedy tokens are those of `model.generate`, however the work is cut up, cached, preempted or moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.requests import SamplingParams
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mistral-window", "qwen2-window"]
LENGTHS = [1, 2, 15, 16, 17, 100, 511, 512, 513, 2000]
COUNT = 10


def expected(peer: Peer, lengths: list[int], count: int = COUNT) -> dict[int, list[int]]:
    return {length: peer.greedy(prompt_of(length), count) for length in lengths}


def ask(engine: TorchEngine, lengths: list[int], count: int = COUNT) -> Answers:
    for length in lengths:
        engine.submit(submit(str(length), prompt_of(length), count))
    return run_all(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_then_batched_after_a_prefix_hit(family: str, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    lengths = LENGTHS if family == "llama" else [1, 16, 17, 100, 513]
    engine = make_engine(family, max_batch_tokens=4096)
    wanted = expected(peer_of(family), lengths)
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(lengths)  # they do depend on the prompt
    for length in lengths:
        assert ask(engine, [length]).tokens(str(length)) == wanted[length]
    together = ask(engine, lengths)
    for length in lengths:
        assert together.tokens(str(length)) == wanted[length]
        assert together.stats(str(length)).cached_token_count == (length - 1) // 16 * 16
    assert_nothing_held(engine)


@pytest.mark.parametrize(("family", "budget", "block_size"), [("llama", 37, 16), ("qwen3", 16, 8), ("mistral-window", 50, 5)])
def test_chunked_and_mixed_with_decodes(family: str, budget: int, block_size: int, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    lengths = [1, 2, 17, 100, 200, 511]
    engine = make_engine(family, max_batch_tokens=budget, block_size=block_size)
    wanted = expected(peer_of(family), lengths)
    answers = Answers()
    for length in lengths:  # each joins while the others are under way
        engine.submit(submit(str(length), prompt_of(length), COUNT))
        for _ in range(3):
            report = engine.step()
            assert report is not None
            answers.add(report)
    run_all(engine, answers)
    assert {length: answers.tokens(str(length)) for length in lengths} == wanted
    assert_nothing_held(engine)


def test_after_preemption(make_engine: MakeEngine, peer_of: PeerOf) -> None:
    """Six sequences of up to 70 tokens share 10 blocks of 16."""
    lengths = [20, 24, 28, 30, 31, 32]
    engine = make_engine(kv_bytes=10 * 8192, max_batch_tokens=64)
    assert engine.card.block_count == 10
    wanted = expected(peer_of("llama"), lengths, 40)
    answers = ask(engine, lengths, 40)
    assert {length: answers.tokens(str(length)) for length in lengths} == wanted
    assert engine.load().preemptions_total > 0
    assert_nothing_held(engine)


@pytest.mark.parametrize("emitted_count", [1, 5, 9])
def test_after_migration(emitted_count: int, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    engine = make_engine()
    wanted = expected(peer_of("llama"), [100])[100]
    engine.submit(submit("moved", prompt_of(100), COUNT, emitted=wanted[:emitted_count]))
    assert run_all(engine).tokens("moved") == wanted[emitted_count:]


def test_what_comes_from_elsewhere_complete_just_ends(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit(submit("full", prompt_of(10), 4, emitted=[1, 2, 3, 4]))
    answers = run_all(engine)
    assert answers.tokens("full") == []
    assert answers.reason("full") == "length"
    assert_nothing_held(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_plain_forward(family: str, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    engine = make_engine(family, max_batch_tokens=48)
    prompt = prompt_of(100)
    engine.submit(submit("one", prompt, COUNT, sampling=SamplingParams(seed=0, temperature=0, top_logprobs=5)))
    answers = run_all(engine)
    tokens = answers.tokens("one")
    plain = torch.log_softmax(peer_of(family).logits(prompt + tokens[:-1]), dim=-1)[len(prompt) - 1 :]
    found = [entry for output in answers.outputs["one"] for entry in output.logprobs or []]
    assert len(found) == COUNT
    for row, token, entry in zip(plain, tokens, found, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert entry.top[0][0] == token


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: str, make_engine: MakeEngine, peer_of: PeerOf) -> None:
    engine = make_engine(dtype=dtype, max_batch_tokens=48)
    prompt = prompt_of(100)
    engine.submit(submit("one", prompt, 4, sampling=SamplingParams(seed=0, temperature=0, top_logprobs=0)))
    answers = run_all(engine)
    tokens = answers.tokens("one")
    plain = torch.log_softmax(peer_of("llama").logits(prompt + tokens[:-1]), dim=-1)[len(prompt) - 1 :]
    found = [entry.logprob for output in answers.outputs["one"] for entry in output.logprobs or []]
    assert found == pytest.approx([float(row[t]) for row, t in zip(plain, tokens, strict=True)], abs=1.0)
    assert engine.card.block_bytes == 4096
