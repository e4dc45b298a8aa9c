"""LoRA adapters on a real vLLM server: `make test-engines-vllm PYTEST_ARGS="-k lora"`. Their tokens are those of the merged weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import NotFoundError, OpenAI

from polyphase.testing import Deployment
from tests.engines.vllm_setting import ENVIRONMENT, MODEL, START_TIMEOUT_S, client_of, options
from tests.unit.engine.adapters import ATTENTION, merged_peer, save_adapter
from tests.unit.engine.tiny import Peer

PROMPT = [100 + (7 * place) % 900 for place in range(100)]
COUNT = 8

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {"sql": save_adapter(folder / "sql", MODEL, seed=1), "poet": save_adapter(folder / "poet", MODEL, 2, ATTENTION, rank=12)}


@pytest.fixture(scope="module")
def served(adapters: dict[str, str]) -> Iterator[Deployment]:
    given = ",".join(f"{name}={folder}" for name, folder in adapters.items())
    further = ("--lora", given, "--dtype", "float32")
    with Deployment(MODEL, *options(*further), start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(served: Deployment) -> OpenAI:
    return client_of(served)


def tokens(client: OpenAI, model: str) -> tuple[list[int], int]:
    """Of the output, and how many of the prompt were cached."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=COUNT, temperature=0, extra_body=extra)
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    found: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
    return found, answer.usage.prompt_tokens_details.cached_tokens or 0


def test_tokens_are_those_of_the_merged_weights(client: OpenAI, adapters: dict[str, str]) -> None:
    wanted = {name: merged_peer(MODEL, folder) for name, folder in adapters.items()} | {"tiny": Peer(MODEL)}
    said = {name: tokens(client, name)[0] for name in wanted}
    assert said == {name: peer.greedy(PROMPT, COUNT) for name, peer in wanted.items()}
    assert len({tuple(one) for one in said.values()}) == 3


def test_they_are_models_and_what_is_none_is_said(client: OpenAI) -> None:
    listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert listed == {"tiny": None, "sql": "tiny", "poet": "tiny"}
    with pytest.raises(NotFoundError, match="poet"):
        tokens(client, "nobody")


def test_the_router_keeps_their_caches_apart(served: Deployment, client: OpenAI) -> None:
    for name in ("tiny", "sql", "poet"):
        tokens(client, name)
    served.wait_for(lambda: served.health()["index"]["block_count"] >= 9, "three times the prompt's blocks in the index")
    assert [tokens(client, name)[1] for name in ("tiny", "sql", "poet")] == [96, 96, 96]
