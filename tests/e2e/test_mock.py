"""A deployment of mock workers, served through the real front door."""

from __future__ import annotations

import httpx
import pytest

from polyphase.testing import Deployment

pytestmark = pytest.mark.e2e


def test_mock_workers_serve_and_hand_over() -> None:
    with Deployment("demo", "--engine", "mock", "--mock-speedup", "inf", "--prefill", "1", "--decode", "2") as served:
        body = {"model": "demo", "prompt": list(range(300, 1300)), "max_tokens": 12, "return_token_ids": True}
        answers = [httpx.post(f"{served.url}/v1/completions", json=body, timeout=60) for _ in range(2)]
        records = [httpx.get(f"{served.url}/debug/requests/{answer.headers['x-request-id']}").json() for answer in answers]
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [12, 12]
    assert answers[0].json()["choices"][0]["text"] == answers[1].json()["choices"][0]["text"]
    assert records[0]["split"]
    assert records[0]["transferred_tokens"] == 1000
    assert records[0]["kv_bytes_moved"] == 63 * 16 * 128 * 1024, "what the blocks of the imagined model would take"
    assert not records[1]["split"], "it is cached where it was decoded"
