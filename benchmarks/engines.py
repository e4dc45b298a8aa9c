"""What Polyphase adds to a stock `vllm serve`, and what it brings over two of them. On the real vLLM, by whose interpreter's path.

Added: one server; the same requests are sent to it directly and through a Polyphase that is attached to it, in turn, at concurrency 1 and
16. Streamed, greedy, token ids in and out, prompts that nobody has cached. TTFT and ITL are medians over requests (a request's mean ITL);
`added_…` are of concurrency 1, `…_c16` of 16. CPU: of frontend and worker, from /proc, over the requests at concurrency 16.

Brought: two servers, people who talk over several turns under one system prompt; policy `kv` against `round-robin`, in turn.
`recomputed_ratio`: prompt tokens that the engines computed (their own count of cached ones), `kv` over `round-robin`.

The engine: `--python` (default: the one that `make test-engines-vllm` installs), its tiny model `--model`. Starting takes a minute or two.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from harness import STDERR, Figure, StreamTimes, arguments, percentile, report, stream_completion
from polyphase.testing import Deployment
from polyphase.testing.deployment import free_port

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyphase-engines"
MODEL_NAME = "tiny"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
START_TIMEOUT_S = 400.0
PROMPT_TOKENS = 256
OUTPUT_TOKENS = 48
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# Conversations
SYSTEM_TOKENS = 320
NEW_TOKENS = (60, 180)
ANSWER_TOKENS = 16
TURNS = 5
AT_ONCE = 3


@contextmanager
def stock_server(python: str, model: Path, folder: Path) -> Iterator[str]:
    """`vllm serve` as one would start it for Polyphase to attach to; its URL. Raises: RuntimeError if it does not come up."""
    folder.mkdir()
    port = free_port()
    events = (
        f'{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc://{folder}/events",'
        f'"replay_endpoint":"ipc://{folder}/replay","topic":"kv-events"}}'
    )
    command = [
        python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16",
        "--block-size", "32", "--kv-cache-memory-bytes", str(128 << 20), "--enable-scale-out", "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log", "--kv-events-config", events,
    ]  # fmt: skip
    log = folder / "vllm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


# What Polyphase adds


@dataclass(slots=True)
class Round:
    times: list[StreamTimes] = field(default_factory=list)
    duration_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.times)


@dataclass(slots=True)
class Way:
    """One of the two ways to the same server, over all rounds at one concurrency."""

    rounds: list[Round] = field(default_factory=list)

    def all(self) -> list[StreamTimes]:
        return [times for one in self.rounds for times in one.times]

    def ttft_ms(self) -> float:
        return statistics.median(times.ttft_ms for times in self.all())

    def itl_ms(self) -> float:
        return statistics.median(statistics.mean(times.itl_ms) for times in self.all())

    def tok_s(self) -> float:
        return statistics.median(one.tokens / one.duration_s for one in self.rounds)

    def cpu_ms_per_request(self) -> float:
        return 1e3 * sum(one.cpu_s for one in self.rounds) / len(self.all())


async def play(url: str, prompts: list[list[int]], concurrency: int) -> Round:
    waiting = iter(prompts)
    found = Round()
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, verify=False, limits=limits) as client:

        async def one_after_the_other() -> None:
            for prompt in waiting:
                found.times.append(await stream_completion(client, prompt, OUTPUT_TOKENS, MODEL_NAME))

        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(one_after_the_other())
        found.duration_s = time.perf_counter() - began
    return found


def fresh_prompts(rng: random.Random, count: int) -> list[list[int]]:
    return [[rng.randrange(100, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def cpu_s(pids: set[int]) -> float:
    """User and system time so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def serving_pids(served: Deployment) -> set[int]:
    """Frontend and worker; not the supervisor, which only watches them."""
    assert served.process is not None
    return served.pids() - {served.process.pid}


def added(direct: str, served: Deployment, rounds: int) -> dict[str, Figure]:
    rng = random.Random(7)
    asyncio.run(play(direct, fresh_prompts(rng, 4), 2))
    asyncio.run(play(served.url, fresh_prompts(rng, 4), 2))
    figures: dict[str, Figure] = {}
    for concurrency, count in ((1, 10), (16, 48)):
        ways = {"direct": Way(), "through": Way()}
        for number in range(rounds):
            for name in ("direct", "through") if number % 2 else ("through", "direct"):
                prompts = fresh_prompts(rng, count)
                before = cpu_s(serving_pids(served))
                found = asyncio.run(play(direct if name == "direct" else served.url, prompts, concurrency))
                found.cpu_s = cpu_s(serving_pids(served)) - before
                ways[name].rounds.append(found)
                STDERR.print(
                    f"concurrency {concurrency}, {name}: TTFT {statistics.median(t.ttft_ms for t in found.times):.1f} ms, "
                    f"{found.tokens / found.duration_s:.0f} tokens/s, CPU {found.cpu_s:.2f} s",
                    style="dim",
                )
        a, b = ways["direct"], ways["through"]
        suffix = "" if concurrency == 1 else f"_c{concurrency}"
        is_one = concurrency == 1
        figures[f"added_ttft_ms_p50{suffix}"] = Figure(b.ttft_ms() - a.ttft_ms(), "ms", "<= 5" if is_one else None)
        figures[f"added_itl_ms_p50{suffix}"] = Figure(b.itl_ms() - a.itl_ms(), "ms", "<= 0.5" if is_one else None)
        figures[f"ttft_ms_p50{suffix}"] = Figure(b.ttft_ms(), "ms", peer=a.ttft_ms())
        figures[f"itl_ms_p50{suffix}"] = Figure(b.itl_ms(), "ms", peer=a.itl_ms())
        figures[f"throughput_ratio{'_c1' if is_one else ''}"] = Figure(b.tok_s() / a.tok_s(), "", None if is_one else ">= 0.97")
        if not is_one:
            idle = a.cpu_ms_per_request()  # what they use while others are served: heartbeats, polling
            per_request = b.cpu_ms_per_request() - idle
            figures["cpu_ms_per_request"] = Figure(per_request, "ms")
            figures["cpu_us_per_token"] = Figure(1e3 * per_request / OUTPUT_TOKENS, "us")
    return figures


# What it brings over two servers


@dataclass(slots=True)
class Talked:
    ttft_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def recomputed(self) -> int:
        return self.prompt_tokens - self.cached_tokens


async def talk(client: httpx.AsyncClient, person: random.Random, system: list[int], talked: Talked) -> None:
    said = list(system)
    for _ in range(TURNS):
        await asyncio.sleep(person.expovariate(1 / 0.3))
        said += [person.randrange(100, 4000) for _ in range(person.randint(*NEW_TOKENS))]
        times = await stream_completion(client, said, ANSWER_TOKENS, MODEL_NAME)
        talked.ttft_ms.append(times.ttft_ms)
        said += times.token_ids


async def conversations(url: str, people: int, seed: int) -> Talked:
    talked = Talked()
    system = [random.Random(seed).randrange(100, 4000) for _ in range(SYSTEM_TOKENS)]
    waiting = iter(range(people))
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, verify=False) as client:

        async def people_one_after_the_other() -> None:
            for number in waiting:
                await talk(client, random.Random(seed + 1 + number), system, talked)

        before = await _counts(client)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(people_one_after_the_other())
        after = await _counts(client)
    talked.cached_tokens, talked.prompt_tokens = after[0] - before[0], after[1] - before[1]
    return talked


async def _counts(client: httpx.AsyncClient) -> tuple[int, int]:
    """Cached and all prompt tokens, as the engines told them of each request; the latest report may be a second old."""
    await asyncio.sleep(1.5)
    workers = (await client.get("/health")).raise_for_status().json()["models"][MODEL_NAME]["workers"].values()
    return sum(w["cached_prompt_tokens_total"] for w in workers), sum(w["prompt_tokens_total"] for w in workers)


def brought(urls: list[str], model: Path, rounds: int, people: int) -> dict[str, Figure]:
    total = {policy: Talked() for policy in ("kv", "round-robin")}
    for number in range(rounds):
        for policy, talked in total.items():
            with attached(urls, model, "--policy", policy) as served:
                found = asyncio.run(conversations(served.url, people, seed=(1 + number) * 1_000_000 + (policy == "kv") * 500_000))
            STDERR.print(f"{policy}: TTFT mean {statistics.mean(found.ttft_ms):.0f} ms, {found.recomputed} tokens computed", style="dim")
            talked.ttft_ms += found.ttft_ms
            talked.prompt_tokens += found.prompt_tokens
            talked.cached_tokens += found.cached_tokens
    kv, other = total["kv"], total["round-robin"]
    share = [talked.recomputed / talked.prompt_tokens for talked in (kv, other)]  # the policies' people say other words
    return {
        "recomputed_ratio": Figure(share[0] / share[1], "", "< 1"),
        "ttft_mean_ratio": Figure(statistics.mean(kv.ttft_ms) / statistics.mean(other.ttft_ms), "", "< 1"),
        "recomputed_share": Figure(share[0], "", peer=share[1]),
        "turns_ttft_ms_mean": Figure(statistics.mean(kv.ttft_ms), "ms", peer=statistics.mean(other.ttft_ms)),
        "turns_ttft_ms_p99": Figure(percentile(kv.ttft_ms, 0.99), "ms", peer=percentile(other.ttft_ms, 0.99)),
    }


def attached(urls: list[str], model: Path, *flags: str) -> Deployment:
    options = ["--engine", "vllm", "--attach", ",".join(urls), "--served-model-name", MODEL_NAME, *flags]
    return Deployment(model, *options, start_timeout_s=START_TIMEOUT_S)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--python", default=str(CACHE / "vllm/bin/python"), help="interpreter that has vLLM")
    parser.add_argument("--model", type=Path, default=CACHE / "tiny", help="folder of the tiny model")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each way (default 4)")
    parser.add_argument("--people", type=int, default=6, help="conversations in one round (default 6)")
    options = parser.parse_args()
    if not Path(options.python).exists() or not options.model.is_dir():
        parser.error("there is no vLLM here; `make test-engines-vllm` installs one, or name it with --python and --model")
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="pp-", dir="/tmp") as folder, ExitStack() as stack:
        with STDERR.status("starting two vLLM servers"):
            urls = [stack.enter_context(stock_server(options.python, options.model, Path(folder) / name)) for name in "ab"]
        with attached(urls[:1], options.model) as served:
            figures |= added(urls[0], served, options.rounds)
        figures |= brought(urls, options.model, max(1, options.rounds // 2), options.people)
    report("engines", figures, as_json=options.json)


if __name__ == "__main__":
    main()
