"""What passing a body through costs: CPU of frontend and worker per request and per streamed chunk, and the latency that they add.

The upstream is the strict test server in a process of its own: it answers at once, so that all that is measured is ours. Chunks are paced,
or they would travel in lumps. Requests are streamed; the CPU of a request is that of one chunk less.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from harness import Figure, arguments, report
from polyphase.testing import Deployment

MODEL = "acme/large-1"
SERVER = """
import asyncio, sys
from tests.unit.openai.server import Manner, OpenAIServer
async def main():
    server = OpenAIServer(Manner(pause_s=float(sys.argv[1])))
    await server.start()
    print(server.url, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parents[1]


def cpu_s(served: Deployment, kind: bytes) -> float:
    pids = [pid for pid in served.pids() if kind in Path(f"/proc/{pid}/cmdline").read_bytes()]
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) * TICK_S


def latency_ms(url: str, model: str, count: int) -> float:
    body = {"model": model, "messages": [{"role": "user", "content": "x" * 1000}], "max_tokens": 1}
    took = []
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        for _ in range(count):
            began = time.perf_counter()
            client.post("/v1/chat/completions", json=body).raise_for_status()
            took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took[count // 10 :])


async def stream(url: str, request_count: int, chunk_count: int, concurrency: int) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": "x" * 1000}], "stream": True, "max_tokens": chunk_count}
    left = iter(range(request_count))

    async def work(client: httpx.AsyncClient) -> None:
        for _ in left:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_raw():
                    pass

    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))


def measure(served: Deployment, chunk_count: int, request_count: int) -> dict[str, float]:
    """CPU ms of each process per request."""
    asyncio.run(stream(served.url, 16, chunk_count, 16))
    before = {kind: cpu_s(served, kind) for kind in (b"polyphase.frontend", b"polyphase.worker")}
    asyncio.run(stream(served.url, request_count, chunk_count, 16))
    return {kind.decode().rpartition(".")[2]: (cpu_s(served, kind) - was) * 1e3 / request_count for kind, was in before.items()}


def main() -> None:
    options = arguments(__doc__).parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    upstream = subprocess.Popen([sys.executable, "-c", SERVER, "0.005"], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert upstream.stdout is not None
        url = upstream.stdout.readline().strip()
        with Deployment(MODEL, "--served-model-name", "x", "--engine", "openai", "--attach", url) as served:
            direct, through = latency_ms(url, MODEL, 300), latency_ms(served.url, "x", 300)
            short, long = measure(served, 1, 600), measure(served, 10, 400)
    finally:
        upstream.kill()
        upstream.wait()
    per_chunk = {name: (long[name] - short[name]) / 9 * 1e3 for name in short}
    figures = {
        "added_latency_ms_p50": Figure(through - direct, "ms"),
        "frontend_cpu_ms_per_request": Figure(short["frontend"], "ms"),
        "worker_cpu_ms_per_request": Figure(short["worker"], "ms"),
        "frontend_cpu_us_per_chunk": Figure(per_chunk["frontend"], "µs"),
        "worker_cpu_us_per_chunk": Figure(per_chunk["worker"], "µs"),
    }
    report("pass_through", figures, as_json=options.json)


if __name__ == "__main__":
    main()
