"""What each sampling parameter does to the choice of a token."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyphase.engines.batching.outcome import SampledToken
from polyphase.engines.batching.sampling_state import SamplingState, uniform
from polyphase.engines.torch.sampling import SamplingRow, sample
from polyphase.wire.requests import SamplingParams

VOCAB = 50


def row(
    position: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    forbidden: set[int] | None = None,
    **params: Any,
) -> SamplingRow:
    state = SamplingState(SamplingParams(**{"seed": 1, **params}), (prompt or []) + (output or []), len(prompt or []))
    return SamplingRow(state, position, frozenset(forbidden or ()))


def chosen(logits: torch.Tensor, one: SamplingRow) -> int:
    (found,) = sample(logits[None, :], [one])
    assert isinstance(found, SampledToken)
    return found.token_id


def drawn(logits: torch.Tensor, count: int = 2000, **params: Any) -> Counter[int]:
    rows = [row(position=i, **params) for i in range(count)]
    return Counter(found.token_id for found in sample(logits.expand(count, -1), rows) if found is not None)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def test_temperature_zero_is_greedy(logits: torch.Tensor) -> None:
    assert chosen(logits, row(temperature=0)) == int(logits.argmax())
    assert chosen(logits, row(temperature=0, top_k=3, top_p=0.1, min_p=0.9)) == int(logits.argmax())


def test_frequencies_follow_the_distribution(logits: torch.Tensor) -> None:
    for temperature in (0.7, 1.0):
        counts = drawn(logits, 4000, temperature=temperature)
        expected = torch.softmax(logits / temperature, dim=-1)
        for token in expected.topk(5).indices.tolist():
            assert counts[token] / 4000 == pytest.approx(float(expected[token]), abs=0.04)


def test_top_k_keeps_the_k_greatest(logits: torch.Tensor) -> None:
    assert set(drawn(logits, top_k=3)) == set(logits.topk(3).indices.tolist())
    assert set(drawn(logits, 100, top_k=1)) == {int(logits.argmax())}
    assert len(drawn(logits, top_k=VOCAB + 5)) > 10


def test_top_p_keeps_the_least_set_that_reaches_p(logits: torch.Tensor) -> None:
    probabilities, order = torch.softmax(logits, dim=-1).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.8).sum()) + 1
    assert set(drawn(logits, 4000, top_p=0.8)) <= set(order[:kept].tolist())
    assert set(drawn(logits, 100, top_p=1e-9)) == {int(order[0])}
    assert set(drawn(logits, 100, top_p=0.0)) == {int(order[0])}


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the first two, 0.4 / 0.7 = 0.57 is not yet 0.6; of all four it would take both as well; 0.57 does for 0.5
    assert set(drawn(logits, top_k=2, top_p=0.6)) == {0, 1}
    assert set(drawn(logits, top_k=2, top_p=0.5)) == {0}
    assert set(drawn(logits, top_p=0.5)) == {0, 1}


def test_top_p_beyond_the_candidates() -> None:
    """A flat distribution over more tokens than are looked at first."""
    logits = torch.zeros(5000)
    logits[:2500] = 1e-3
    counts = drawn(logits, 400, top_p=0.999)
    assert max(counts) > 4000
    logits[:2500] = 10.0
    assert max(drawn(logits, 200, top_p=0.9)) < 2500


def test_min_p_is_a_share_of_the_most_probable() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(drawn(logits, min_p=0.5)) == {0, 1}
    assert set(drawn(logits, min_p=0.2)) == {0, 1, 2}


def test_logit_bias_moves_and_bans(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert chosen(logits, row(temperature=0, logit_bias={7: 100.0})) == 7
    assert chosen(logits, row(temperature=0, logit_bias={best: -100.0})) == int(logits.topk(2).indices[1])


def test_presence_and_frequency_count_output_only() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0])
    assert chosen(logits, row(temperature=0, presence_penalty=0.5, prompt=[0, 0])) == 0
    assert chosen(logits, row(temperature=0, presence_penalty=0.5, output=[0])) == 1
    assert chosen(logits, row(temperature=0, frequency_penalty=0.04, output=[0, 0])) == 0
    assert chosen(logits, row(temperature=0, frequency_penalty=0.04, output=[0, 0, 0])) == 1


def test_repetition_counts_the_prompt_and_shrinks_both_signs() -> None:
    assert chosen(torch.tensor([2.0, 1.9]), row(temperature=0, repetition_penalty=1.2, prompt=[0])) == 1
    assert chosen(torch.tensor([-1.0, -1.1]), row(temperature=0, repetition_penalty=1.2, output=[0])) == 1
    assert chosen(torch.tensor([2.0, 1.9]), row(temperature=0, repetition_penalty=1.2, output=[1])) == 0


def test_noted_tokens_count() -> None:
    one = row(temperature=0, frequency_penalty=0.2)
    logits = torch.tensor([2.0, 1.9])
    assert chosen(logits, one) == 0
    one.state.note(0)
    assert chosen(logits, one) == 1


def test_forbidden_tokens_are_not_chosen(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert chosen(logits, row(temperature=0, forbidden={best, 10**6})) != best
    assert best not in drawn(logits, forbidden={best})


def test_logprobs_are_the_model_s_own(logits: torch.Tensor) -> None:
    plain = torch.log_softmax(logits, dim=-1)
    (found,) = sample(logits[None, :], [row(temperature=0.5, top_k=1, logit_bias={3: 100.0}, top_logprobs=4)])
    assert found is not None
    assert found.logprob is not None
    assert found.token_id == found.logprob.token_id == 3
    assert found.logprob.logprob == pytest.approx(float(plain[3]))
    assert [token for token, _ in found.logprob.top] == plain.topk(4).indices.tolist()
    (bare,) = sample(logits[None, :], [row(temperature=0, top_logprobs=0)])
    assert bare is not None
    assert bare.logprob is not None
    assert bare.logprob.top == []


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.5}, {"temperature": 0, "presence_penalty": 1}]
)
def test_what_is_not_a_number_is_not_sampled(logits: torch.Tensor, params: dict[str, float]) -> None:
    broken = logits.clone()
    broken[9] = math.nan
    good, bad = sample(torch.stack([logits, broken]), [row(**params), row(**params)])
    assert good is not None
    assert bad is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    seeds = data.draw(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=6))
    logits = torch.randn(len(seeds), VOCAB, generator=torch.Generator().manual_seed(len(seeds))) * 3
    rows = [
        row(
            seed=seed,
            position=data.draw(st.integers(0, 50)),
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 5])),
            top_p=data.draw(st.sampled_from([1.0, 0.9, 0.3])),
            min_p=data.draw(st.sampled_from([0.0, 0.1])),
            presence_penalty=data.draw(st.sampled_from([0.0, 1.0])),
            output=data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=5)),
            top_logprobs=data.draw(st.sampled_from([None, 2])),
        )
        for seed in seeds
    ]
    together = [found.token_id for found in sample(logits, rows) if found is not None]
    assert together == [chosen(line, one) for line, one in zip(logits, rows, strict=True)]


def test_the_random_numbers_are_fixed() -> None:
    """A change here changes what every seed gives, for every user."""
    found = [round(uniform(seed, position), 12) for seed, position in ((0, 0), (0, 1), (1, 0), (-1, 7))]
    assert found == [0.815039300774, 0.050715366213, 0.152139728086, 0.990852790768]
    numbers = [uniform(5, i) for i in range(10_000)]
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)
