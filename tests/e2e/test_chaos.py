"""The short form of `make test-chaos`: some faults of every kind over some requests, on a fixed seed. And that its checkers can say no."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from polyphase.testing import Deployment, connections
from polyphase.testing.ledger import Account, Ledger
from polyphase.testing.planting import planted_environment
from polyphase.testing.tripwires import Tripwires
from polyphase.wire.requests import FinishReason, SequenceOutput
from tests.chaos.__main__ import SCENES
from tests.chaos.cases import Answer, Case, Choice, difference, difference_so_far
from tests.chaos.checks import breakdowns
from tests.chaos.outages import Outages
from tests.chaos.run import play

CASE = Case("x", "/v1/completions", {"n": 1})


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "faults", "requests"), [("torch", 10, 40), ("torch-tcp", 10, 40), ("mock", 30, 200)])
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
        (dataclasses.replace(answer(), late_count=1), "1 messages after the first"),
        (dataclasses.replace(answer(), errors=[{"code": "worker_lost"}]), "an error after it was accepted"),
        (Answer({}, done_count=1), "choices"),
    ],
)
def test_the_checkers_tell_wrong_answers(found: Answer, complaint: str) -> None:
    assert complaint in (difference(answer(), found, CASE) or "")


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (answer(token_ids=[1], text="a", finish_reasons=[]), None),
        (answer(), None),
        (Answer({}), None),
        (answer(token_ids=[2], text="a", finish_reasons=[]), "no beginning"),
        (answer(token_ids=[1, 2, 3]), "no beginning"),
        (answer(text="b"), "no beginning"),
        (answer(finish_reasons=["length", "length"]), "terminal messages"),
        (Answer({1: Choice()}), "was not asked for"),
        (dataclasses.replace(answer(), errors=[{"code": "worker_lost"}]), "an error"),
    ],
)
def test_what_broke_off_must_have_begun_well(found: Answer, complaint: str | None) -> None:
    wrong = difference_so_far(answer(), found)
    assert (wrong is None) if complaint is None else (complaint in (wrong or ""))


def test_a_connection_may_break_only_while_its_frontend_is_away() -> None:
    outages = Outages()
    assert not outages.touch("a", 0.0)
    outages.begin("a")
    assert outages.is_out("a")
    assert outages.touch("a", time.monotonic())
    outages.end("a")
    assert not outages.is_out("a")
    assert outages.touch("a", 0.0), "it was away while this request waited"
    assert not outages.touch("a", time.monotonic() + 1)
    assert not outages.touch("b", 0.0)


def test_what_closes_while_it_is_cut_does_not_end_all_cutting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(connections, "_socket_fds", lambda pid, inodes: [9999])  # it had this one a moment ago
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert connections.cut_connections(other.pid, tmp_path) == 0
        finally:
            other.kill()
    with pytest.raises(ProcessLookupError):
        connections.cut_connections(other.pid, tmp_path)


def output(request_id: str, finish_reason: FinishReason | None = None, token_ids: tuple[int, ...] = (1,)) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, token_ids=list(token_ids), finish_reason=finish_reason)


def test_the_ledger_tells_what_a_worker_must_not_say() -> None:
    account = Account()
    account.submitted(b"peer", "r")
    assert account.told(b"peer", output("r")) is None
    assert account.told(b"peer", output("r", FinishReason.LENGTH)) is None
    assert "after its end" in (account.told(b"peer", output("r", FinishReason.LENGTH)) or "")
    assert "after its end" in (account.told(b"peer", output("r")) or "")
    assert "never asked" in (account.told(b"other", output("r")) or "")
    account.submitted(b"peer", "r")
    assert account.told(b"peer", output("r", FinishReason.CANCELLED)) is None


def test_the_ledger_and_tripwires_work_in_a_real_worker(tmp_path: Path) -> None:
    ledger, wires = Ledger(tmp_path), Tripwires(tmp_path)
    with Deployment("demo", "--engine", "mock", "--workers", "2", environment=planted_environment(tmp_path)) as served:
        body = {"model": "demo", "prompt": "hello", "max_tokens": 40}
        whole = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
        served.wait_for(lambda: ledger.ended_count() == 1, "the end in the ledger")  # it is noted behind the answer
        victims = [worker.pid for worker in served.workers().values()]
        for pid in victims:
            wires.order("kill", "accepting", pid)
        with pytest.raises(ValueError, match="moments: accepting"):
            wires.order("kill", "sleeping", victims[0])
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        carried_out = served.wait_for(wires.carried_out, "a kill that is noted")
        assert {trip.pid for trip in carried_out} <= set(victims)
        if answer.status_code == 200:  # a third life was there in time
            assert answer.json()["choices"] == whole["choices"]
        wires.withdraw()
        assert wires.pending() == []
    assert ledger.violations() == []


ENDED = """2026-11-24 18:38:51.771 ERROR   decode-0 the worker broke down
  + Exception Group Traceback (most recent call last):
      |   File "registry.py", line 79, in publish
      | {cause}
2026-11-24 18:39:11.831 INFO    decode-0 loading demo with engine mock
"""


@pytest.mark.parametrize(
    ("cause", "complaint_count"),
    [("OSError: [Errno 28] No space left on device", 0), ("polyphase.core.errors.KvError: lease 1 exists already", 1), ("", 0)],
)
def test_a_worker_that_broke_down_by_itself_is_a_violation(cause: str, complaint_count: int) -> None:
    assert len(breakdowns(ENDED.format(cause=cause))) == complaint_count


def test_the_checkers_let_right_answers_pass() -> None:
    assert difference(answer(), answer(logprobs=[-0.501, -0.5]), CASE) is None
