"""The same as decision.py, done by Dynamo's KvRouter through its Python bindings. Run by decision.py in Dynamo's environment.

Workers are Dynamo's own mockers in another process. `best_worker` takes token ids, so hashing them is part of what is timed, about 70 us
of it; awaits go through its runtime's threads. CPU time of this whole process. Prompts are warmed by routing each once.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

PROMPT_TOKENS = 4096
SYSTEM_TOKENS = 1024
ENVIRONMENT = {
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_EVENT_PLANE": "zmq",
    "DYN_LOG": "error",
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    "DYN_EVENT_PLANE_HOST": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}


async def decisions_us(router, prompts, rng, count):
    began = time.process_time_ns()
    for number in range(count):
        request_id = f"r{rng.random()}-{number}"
        await router.best_worker(rng.choice(prompts), request_id=request_id)
        await router.mark_prefill_complete(request_id)
        await router.free(request_id)
    return (time.process_time_ns() - began) / count / 1e3


async def measure(worker_count, rounds):
    from dynamo.llm import KvRouter, KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    rng = random.Random(worker_count)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("dynamo.backend.generate")
    client = await endpoint.client()
    deadline = time.monotonic() + 300
    while len(client.instance_ids()) < worker_count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(client.instance_ids())} of {worker_count} mockers came up")
        await asyncio.sleep(0.5)
    router = KvRouter(endpoint, 16, KvRouterConfig())
    await asyncio.sleep(3)
    system = [rng.randrange(30_000) for _ in range(SYSTEM_TOKENS)]
    prompts = [system + [rng.randrange(30_000) for _ in range(PROMPT_TOKENS - SYSTEM_TOKENS)] for _ in range(100)]
    await decisions_us(router, prompts, rng, 200)
    return statistics.median([await decisions_us(router, prompts, rng, 200) for _ in range(rounds)])


def main():
    worker_count, rounds, model = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT, DYN_FILE_KV=folder)
        command = [sys.executable, "-m", "dynamo.mocker", "--model-path", model, "--model-name", "peer", "--block-size", "16"]
        with open(Path(folder) / "mockers.log", "wb") as log:
            mockers = subprocess.Popen([*command, "--num-workers", str(worker_count)], stdout=log, stderr=log)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                figure = runner.run(measure(worker_count, rounds))
                print(json.dumps({f"decision_w{worker_count}": figure}), flush=True)
        finally:
            mockers.terminate()
            try:
                mockers.wait(20)
            except subprocess.TimeoutExpired:
                mockers.kill()
    os._exit(0)  # its runtime's threads do not end by themselves


if __name__ == "__main__":
    main()
