"""The short form of `make test-chaos`: some faults of every kind over some requests, on a fixed seed. And that its checkers can say no."""

from __future__ import annotations

import dataclasses

import pytest

from tests.chaos.__main__ import SCENES
from tests.chaos.cases import Answer, Case, Choice, difference
from tests.chaos.run import play

CASE = Case("x", "/v1/completions", {"n": 1})


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "faults", "requests"), [("torch", 12, 60), ("mock", 30, 200)])
def test_faults_are_not_noticed(name: str, faults: int, requests: int) -> None:
    scene = dataclasses.replace(SCENES[name], fault_count=faults, request_count=requests, longest_s=90)
    outcome = play(scene, seed=2)
    assert outcome.violations == []
    assert outcome.requests >= requests // 2, "the machine is too slow to say anything"
    assert sum(outcome.faults.values()) > 0


def answer(**fields: object) -> Answer:
    choice = dataclasses.replace(Choice("ab", [1, 2], ["length"], [-0.5, -0.5]), **fields)  # type: ignore[arg-type]
    return Answer({0: choice}, done_count=1)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (answer(token_ids=[1]), "other tokens"),
        (answer(token_ids=[1, 2, 2]), "other tokens"),
        (answer(text="abb"), "instead of"),
        (answer(finish_reasons=[]), "0 terminal messages"),
        (answer(finish_reasons=["length", "length"]), "2 terminal messages"),
        (answer(finish_reasons=["stop"]), "instead of"),
        (answer(logprobs=[-0.5, -0.6]), "log-probabilities"),
        (dataclasses.replace(answer(), done_count=2), "2 ends"),
        (dataclasses.replace(answer(), done_count=0), "0 ends"),
        (dataclasses.replace(answer(), errors=[{"code": "worker_lost"}]), "an error after it was accepted"),
        (Answer({}, done_count=1), "choices"),
    ],
)
def test_the_checkers_tell_wrong_answers(found: Answer, complaint: str) -> None:
    assert complaint in (difference(answer(), found, CASE) or "")


def test_the_checkers_let_right_answers_pass() -> None:
    assert difference(answer(), answer(logprobs=[-0.501, -0.5]), CASE) is None
