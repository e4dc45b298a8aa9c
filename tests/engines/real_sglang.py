"""Polyphase before real SGLang servers: `make test-engines-sglang`. Not part of `make test`, whose SGLang is played from recordings.

Two servers for the first class of tests, a prefill and a decode server for the second; on a small machine they are up after one to three
minutes. ENGINE_PYTHON names the interpreter that tools/install_sglang.py printed, and ENGINE_MODEL the folder that
tools/make_tiny_model.py wrote. The tests of a class build on each other and run in this order.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI

from polyphase.testing import Deployment
from tests.engines.processes import engine_pids

START_TIMEOUT_S = 500.0
MODEL = os.environ["ENGINE_MODEL"]
PROMPT = list(range(100, 300))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "SGLANG_CPU_TRANSFER": "1"}
ON_A_CPU = "--attention-backend torch_native --sampling-backend pytorch --mem-fraction-static 0.6 --sleep-on-idle"
OPTIONS = [
    "--engine", "sglang", "--engine-python", os.environ["ENGINE_PYTHON"], "--served-model-name", "tiny", "--device", "cpu",
    "--dtype", "float32", "--block-size", "16", "--kv-memory", "32MiB", "--max-running", "8",
]  # fmt: skip

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 60)]


def client_of(served: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def complete(served: Deployment, prompt: list[int], count: int = 8, **fields: Any) -> Any:
    body = {"return_token_ids": True, "ignore_eos": True, **fields.pop("extra_body", {})}
    return client_of(served).completions.create(
        model="tiny", prompt=prompt, max_tokens=count, extra_body=body, **{"temperature": 0, **fields}
    )


def begin(served: Deployment, count: int) -> tuple[str, Iterator[list[int]]]:
    """A streamed answer: the worker that serves it, and its tokens as they come."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    stream = client_of(served).completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=count, temperature=0, stream=True, extra_body=extra
    )
    chunks: Any = stream.parse()
    tokens = (list(chunk.choices[0].token_ids or []) for chunk in chunks)
    first = next(tokens)
    worker_id: str = served.record(stream.headers["x-request-id"])["decode_worker"]
    return worker_id, itertools.chain([first], tokens)


def engine_url(served: Deployment, worker_id: str) -> str:
    """The latest one: a worker that was started again has another."""
    (log,) = served.home.rglob(f"{worker_id}.log")
    return str(re.findall(r"SGLang \S+ at (http://127\.0\.0\.1:\d+)", log.read_text(errors="replace"))[-1])


def direct_tokens(url: str, prompt: list[int], count: int = 8) -> list[int]:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}}
    tokens: list[int] = httpx.post(f"{url}/generate", json=body, timeout=120).raise_for_status().json()["output_ids"]
    return tokens


@functools.cache
def reference_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()


def greedy_tokens(prompt: list[int], count: int = 8) -> list[int]:
    """As transformers computes them, without anybody's cache or transfer."""
    import torch

    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(reference_model()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def running_count(url: str) -> int:
    return sum(load["num_running_reqs"] for load in httpx.get(f"{url}/v1/loads", timeout=30).json()["loads"])


def stalled(served: Deployment) -> list[str]:
    return [name for name, worker in served.health()["models"]["tiny"]["workers"].items() if worker.get("is_stalled")]


def prompts() -> Iterator[list[int]]:
    for length in (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 127, 128, 129, 200, 255, 256, 300, 500, 777, 1000, 1500):
        yield [100 + (7 * place + length) % 900 for place in range(length)]


class TestTwoWorkers:
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls) -> Iterator[Deployment]:
        options = [*OPTIONS, "--workers", "2", "--engine-args", ON_A_CPU]
        with Deployment(MODEL, *options, start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
            yield deployment

    def test_whole_and_streamed_answers_are_the_same(self, served: Deployment) -> None:
        whole = complete(served, PROMPT, 20)
        chunks = list(complete(served, PROMPT, 20, stream=True, stream_options={"include_usage": True}))
        assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 20
        assert whole.choices[0].finish_reason == "length"
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert len(chunks) > 5, "it is streamed"

    def test_tokens_are_those_of_the_engine_asked_directly(self, served: Deployment) -> None:
        url = engine_url(served, "worker-0")
        for prompt in prompts():
            assert complete(served, prompt).choices[0].token_ids == direct_tokens(url, prompt) == greedy_tokens(prompt), len(prompt)

    def test_chat_with_logprobs(self, served: Deployment) -> None:
        answer = client_of(served).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "kabas loden"}], max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
        )
        content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
        assert answer.usage is not None
        assert content is not None
        assert len(content) == answer.usage.completion_tokens
        assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)

    def test_requests_go_where_their_prefix_is(self, served: Deployment) -> None:
        prompt = [3000 + place % 700 for place in range(320)]
        before = served.health()["index"]["block_count"]
        first = complete(served, prompt)
        served.wait_for(lambda: served.health()["index"]["block_count"] >= before + 20, "the prompt's blocks in the index")
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        homes = set()
        for number in range(4):
            answer = client_of(served).completions.with_raw_response.create(
                model="tiny", prompt=[*prompt, 9 + number], max_tokens=4, temperature=0
            )
            usage = answer.parse().usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == 320
            record = served.record(answer.headers["x-request-id"])
            assert (record["cached_tokens"], record["predicted_cached_tokens"]) == (320, 320), record
            homes.add(record["decode_worker"])
        assert len(homes) == 1

    def test_a_salt_keeps_tenants_apart(self, served: Deployment) -> None:
        prompt = [2000 + place % 700 for place in range(200)]
        found = []
        for salt in ("a", "a", "b"):
            answer = complete(served, prompt, 2, extra_body={"cache_salt": salt})
            found.append(answer.usage.prompt_tokens_details.cached_tokens)
            served.wait_for(lambda: True, "the events")
        assert found[0] == found[2] == 0
        assert found[1] == 192

    def test_who_goes_away_frees_the_engine_at_once(self, served: Deployment) -> None:
        stream = complete(served, PROMPT, 3000, stream=True)
        next(iter(stream))
        stream.close()
        urls = [engine_url(served, worker_id) for worker_id in served.workers()]
        served.wait_for(lambda: not any(map(running_count, urls)), "the engines to be idle; 3000 tokens take much longer", timeout_s=15)

    def test_what_the_engine_does_not_take_is_the_callers_fault(self, served: Deployment) -> None:
        for prompt in ([1] * 5000, [1] * 4090, [99999]):
            with pytest.raises(APIError) as raised:
                complete(served, prompt)
            assert getattr(raised.value, "status_code", None) == 400
        assert len(served.workers()) == 2, "nobody died of it"

    def test_more_requests_than_the_engines_run_at_a_time(self, served: Deployment) -> None:
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(complete(served, [500 + n, *PROMPT[:50]], 12)))  # type: ignore[misc]
            for n in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert [answer.usage.completion_tokens for answer in answers] == [12] * 24

    def test_a_stopped_engine_is_noticed_and_taken_back(self, served: Deployment) -> None:
        """SIGSTOP of its scheduler: its web server goes on as if nothing were. The stream goes on at the other worker."""
        expected = complete(served, PROMPT, 60).choices[0].token_ids
        worker_id, chunks = begin(served, 60)
        tokens = next(chunks)
        schedulers = engine_pids(served, worker_id, "sglang::schedul")  # of a name, the system keeps 15 characters
        assert schedulers
        for pid in schedulers:
            os.kill(pid, signal.SIGSTOP)
        try:
            tokens += [token for chunk in chunks for token in chunk]
            served.wait_for(lambda: stalled(served) == [worker_id], "the quarantine", timeout_s=90)
        finally:
            for pid in schedulers:
                os.kill(pid, signal.SIGCONT)
        assert tokens == expected
        served.wait_for(lambda: not stalled(served), "the end of the quarantine", timeout_s=90)

    def test_kill_9_in_mid_stream_is_not_seen_by_the_client(self, served: Deployment) -> None:
        expected = complete(served, PROMPT, 60).choices[0].token_ids
        worker_id, chunks = begin(served, 60)
        tokens = next(chunks)
        before = set(engine_pids(served, worker_id))
        os.kill(engine_pids(served, worker_id, "sglang::schedul")[0], signal.SIGKILL)
        tokens += [token for chunk in chunks for token in chunk]
        assert tokens == expected
        said = "sglang ended: its process scheduler_0 was killed by SIGKILL"
        served.wait_for(lambda: said in served.output(), "the explanation")
        served.wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in before), "the end of what the engine had started", 60)
        served.wait_for(lambda: len(served.workers()) == 2, "the next life", START_TIMEOUT_S)
        assert complete(served, PROMPT, 4).usage.completion_tokens == 4

    def test_no_stand_in_was_called_and_nothing_is_left(self, served: Deployment) -> None:
        assert "a stand-in for SGLang's CUDA kernels was called" not in served.logs()
        pids = [pid for worker_id in served.workers() for pid in engine_pids(served, worker_id)]
        assert pids
        served.stop()
        served.wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the end of all processes", 60)


class TestHalves:
    """The KV goes over TCP by Mooncake, with the CUDA calls around it left away: see tools/sglang_cpu_stand_ins."""

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls) -> Iterator[Deployment]:
        options = [*OPTIONS, "--prefill", "1", "--decode", "1", "--engine-args", f"{ON_A_CPU} --num-reserved-decode-tokens 64"]
        with Deployment(MODEL, *options, start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
            yield deployment

    def test_disaggregated_tokens_are_the_models(self, served: Deployment) -> None:
        for prompt in prompts():
            assert complete(served, prompt).choices[0].token_ids == greedy_tokens(prompt), len(prompt)

    def test_it_was_split(self, served: Deployment) -> None:
        answer = client_of(served).completions.with_raw_response.create(model="tiny", prompt=[5], max_tokens=4, temperature=0)
        record = served.record(answer.headers["x-request-id"])
        assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0"), "also the shortest"

    def test_logprobs_of_the_first_token_come_over(self, served: Deployment) -> None:
        answer = complete(served, PROMPT, 4, logprobs=2)
        assert len(answer.choices[0].logprobs.token_logprobs) == 4

    def test_who_goes_away_frees_both(self, served: Deployment) -> None:
        stream = complete(served, PROMPT, 3000, stream=True)
        next(iter(stream))
        stream.close()
        urls = [engine_url(served, worker_id) for worker_id in ("prefill-0", "decode-0")]
        served.wait_for(lambda: not any(map(running_count, urls)), "the engines to be idle", timeout_s=15)

    def test_no_role_is_switched(self, served: Deployment) -> None:
        assert served.workers()["prefill-0"].role == "prefill"
        assert served.health()["models"]["tiny"].get("misfits") == []

    def test_a_killed_prefill_server_is_waited_for(self, served: Deployment) -> None:
        expected = complete(served, PROMPT, 6).choices[0].token_ids
        os.kill(engine_pids(served, "prefill-0")[0], signal.SIGKILL)
        served.wait_for(lambda: "prefill-0" not in served.workers(), "its end", 60)
        served.wait_for(lambda: "prefill-0" in served.workers(), "its next life", START_TIMEOUT_S)
        assert complete(served, PROMPT, 6).choices[0].token_ids == expected
        assert "a stand-in for SGLang's CUDA kernels was called" not in served.logs()
