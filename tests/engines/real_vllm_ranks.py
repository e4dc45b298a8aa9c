"""One real vLLM server with two data-parallel ranks, each a worker of its own, 5 GB: `make test-engines-vllm PYTEST_ARGS="-k ranks"`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from polyphase.testing import Deployment
from tests.engines.vllm_setting import ENVIRONMENT, MODEL, START_TIMEOUT_S, client_of, engine_urls, is_well, metric, options

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    given = options(engine_args="--data-parallel-size 2 --api-server-count 1")
    with Deployment(MODEL, *given, start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
        deployment.wait_for(lambda: is_well(deployment), "both ranks", 60)
        yield deployment


def test_each_rank_keeps_its_own_conversations(served: Deployment) -> None:
    client = client_of(served)
    assert set(served.workers()) == {"worker-0", "worker-0-rank-1"}
    homes: dict[int, str] = {}
    for turn in range(2):
        for number in range(4):
            prompt = [100 + (number * 977 + 13 * place * place) % 3900 for place in range(200)]
            answer = client.completions.with_raw_response.create(
                model="tiny", prompt=prompt, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
            )
            usage: Any = answer.parse().usage
            worker = answer.headers["x-polyphase-decode-worker"]
            assert homes.setdefault(number, worker) == worker
            assert usage.prompt_tokens_details.cached_tokens == (192 if turn else 0), (turn, number)
            served.wait_for(lambda: _held(served) >= 6 * len(homes), "the prompt's blocks in the index")
    assert set(homes.values()) == {"worker-0", "worker-0-rank-1"}
    url = engine_urls(served)["worker-0"]
    for rank, worker in enumerate(("worker-0", "worker-0-rank-1")):
        hits = metric(url, "prefix_cache_hits_total", f'engine="{rank}"')
        assert hits == 192 * sum(home == worker for home in homes.values()), "the rank that was chosen computed it"


def _held(served: Deployment) -> int:
    count: int = served.health()["index"]["block_count"]
    return count
