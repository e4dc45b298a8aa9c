"""A deployment of mock workers, served through the real front door."""

from __future__ import annotations

import asyncio
from pathlib import Path

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


def test_prompts_are_split_between_two_tables_of_one_group(tmp_path: Path) -> None:
    """As `polyphase advise` writes them: prefill and decode workers with settings of their own."""
    file = tmp_path / "polyphase.toml"
    table = '[[groups]]\nmodel = "demo"\ngroup = "both"\n'
    file.write_text(
        f'engine = "mock"\nmock_speedup = inf\n{table}prefill = 1\nmax_running = 8\n{table}decode = 1\nmock_accelerator = "2xh100"\n'
    )
    with Deployment(None, "--config", str(file)) as served:
        body = {"model": "demo", "prompt": list(range(300, 1300)), "max_tokens": 12}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        record = httpx.get(f"{served.url}/debug/requests/{answer.headers['x-request-id']}").json()
    assert answer.json()["usage"]["completion_tokens"] == 12
    assert record["split"]
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["transferred_tokens"] == 1000


async def test_under_overload_nothing_is_lost_and_nobody_is_left_out() -> None:
    """One tenant floods a worker that runs two requests at once; another one asks a little."""
    options = ["--engine", "mock", "--max-running", "2", "--max-queued-requests", "8"]
    with Deployment("demo", *options) as served:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as client:

            async def ask(tenant: str, number: int) -> httpx.Response:
                body = {"model": "demo", "prompt": [300 + number] * 20, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
                return await client.post(f"{served.url}/v1/completions", json=body, headers={"x-polyphase-tenant": tenant})

            flood = [asyncio.create_task(ask("flood", number)) for number in range(40)]
            await asyncio.sleep(0.1)
            calm = await asyncio.gather(*(ask("calm", number) for number in range(3)))
            answers = [*await asyncio.gather(*flood), *calm]
            metrics = (await client.get(f"{served.url}/metrics")).text
        health = served.health()
    assert [answer.status_code for answer in calm] == [200] * 3, "who asks a little finds a place in a full queue"
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused, "forty at once were to be too many"
    for answer in refused:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] in ("overloaded", "evicted")
        assert int(answer.headers["retry-after"]) >= 1
    served_well = [answer for answer in answers if answer.status_code == 200]
    assert all(len(answer.json()["choices"][0]["token_ids"]) == 40 for answer in served_well)
    assert len(served_well) >= 11, "two run, one waits there, and eight wait in the queue"
    assert health["active_requests"] == 0
    assert "queues" not in health["models"]["demo"]
    assert 'polyphase_frontend_queued_requests{model="demo"} 0.0' in metrics
    evicted = sum(answer.json()["error"]["code"] == "evicted" for answer in refused)
    told = {
        line.split(" ")[0]: float(line.split(" ")[1]) for line in metrics.splitlines() if line.startswith("polyphase_frontend_admission")
    }
    assert told.get('polyphase_frontend_admission_evictions_total{model="demo",reason="displaced"}', 0.0) == evicted
    assert told['polyphase_frontend_admission_rejections_total{model="demo",reason="queue_full"}'] == len(refused) - evicted
