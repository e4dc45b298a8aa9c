"""Blocks that are damaged between two workers over TCP are found and computed again: the tokens are those of an undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from polyphase.testing import Deployment
from polyphase.testing.wire_faults import KINDS, FaultKind, WireFaults

from .conftest import GreedyTokens, prompt_of

COUNT = 12


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, WireFaults]]:
    faults = WireFaults(tmp_path_factory.mktemp("faults"))
    options = ("--prefill", "1", "--decode", "1", "--split-threshold", "64")
    with Deployment("demo", *options, environment=faults.environment()) as served:
        yield served, faults


def ask(served: Deployment, prompt: list[int]) -> tuple[list[int], dict[str, object]]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=100).raise_for_status()
    return response.json()["choices"][0]["token_ids"], served.record(response.headers["x-request-id"])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_on_the_way_changes_no_token(kind: FaultKind, disturbed: tuple[Deployment, WireFaults], greedy: GreedyTokens) -> None:
    served, faults = disturbed
    sound = prompt_of(700, seed=30 + KINDS.index(kind))
    tokens, record = ask(served, sound)
    assert tokens == greedy(sound, COUNT)
    assert record["transferred_tokens"] == len(sound)
    before = faults.carried_out()
    faults.order(kind)
    spoiled = prompt_of(700, seed=40 + KINDS.index(kind))
    tokens, _ = ask(served, spoiled)
    assert tokens == greedy(spoiled, COUNT)
    assert faults.carried_out() == [*before, kind]
    assert faults.pending() == 0


def test_blocks_went_by_tcp(disturbed: tuple[Deployment, WireFaults]) -> None:
    served, _ = disturbed
    assert "its blocks are read by tcp" in served.logs()


def test_an_order_is_checked_and_can_be_withdrawn(tmp_path: Path) -> None:
    faults = WireFaults(tmp_path)
    with pytest.raises(ValueError, match="only flip, swap, truncate"):
        faults.order("melt")  # type: ignore[arg-type]
    faults.order("flip", 1)
    assert faults.pending() == 1
    faults.withdraw()
    assert (faults.pending(), faults.carried_out()) == (0, [])
