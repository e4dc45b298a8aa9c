"""The whole system answers as one plain model would, whichever workers a request runs on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from polyphase.testing import Deployment

from .conftest import GreedyTokens, completed_ids, prompt_of

QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
EXACT = {"ignore_eos": True, "return_token_ids": True}


def test_models_lists_what_is_served(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_streamed_and_whole_chat_answers_are_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=60)
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text != ""
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 300, 511, 512, 513, 1000, 2000])
def test_tokens_equal_generate_split_or_not(split: Deployment, client: OpenAI, greedy: GreedyTokens, length: int) -> None:
    prompt = prompt_of(length)
    answer = client.completions.with_raw_response.create(model="demo", prompt=prompt, temperature=0, max_tokens=24, extra_body=EXACT)
    assert completed_ids(answer.parse()) == greedy(prompt, 24)
    record = split.record(answer.headers["x-request-id"])
    assert record["split"] == (length >= 64)
    assert record["prefill_worker"].startswith("prefill" if length >= 64 else "decode")
    assert record["decode_worker"].startswith("decode")
    assert (record["kv_bytes_moved"] > 0) == (length >= 64)


def test_many_at_once_equal_each_alone(client: OpenAI, greedy: GreedyTokens) -> None:
    prompts = [prompt_of(length, seed=1) for length in (3, 40, 90, 200, 333, 700) * 3]

    def complete(prompt: list[int]) -> list[int]:
        return completed_ids(client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=16, extra_body=EXACT))

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == [greedy(prompt, 16) for prompt in prompts]


def test_a_repeated_prompt_is_cached_and_says_so(split: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    prompt = prompt_of(400, seed=2)
    first, second = (
        client.completions.with_raw_response.create(model="demo", prompt=prompt, temperature=0, max_tokens=12, extra_body=EXACT)
        for _ in range(2)
    )
    assert completed_ids(first.parse()) == completed_ids(second.parse()) == greedy(prompt, 12)
    usage = second.parse().usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 384  # 25 blocks of 16, and one token must be computed
    record = split.record(second.headers["x-request-id"])
    assert not record["split"], "what the decode worker has cached need not be computed elsewhere"


def test_the_next_turn_of_a_conversation_hits_the_cache(client: OpenAI) -> None:
    messages = [{"role": "system", "content": "You answer in short and plain sentences about Python. " * 4}, *QUESTION]
    for turn in range(3):
        answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=40)
        assert answer.usage is not None
        if turn:
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens // 2
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "And what does it return?"},
        ]


def test_a_seed_gives_the_same_tokens_in_any_company(client: OpenAI) -> None:
    prompt = prompt_of(100, seed=3)

    def sample(seed: int) -> list[int]:
        response = client.completions.create(model="demo", prompt=prompt, temperature=1.0, seed=seed, max_tokens=24, extra_body=EXACT)
        return completed_ids(response)

    alone = sample(7)
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(sample, [7, 1, 2, 7, 3, 4, 7, 5]))
    assert crowd[0] == crowd[3] == crowd[6] == alone
    assert len({tuple(tokens) for tokens in crowd}) > 1


def test_several_choices_and_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, n=3, temperature=1.0, seed=1, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=30).choices[0].message.content
    assert whole is not None
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=30, stop=[stop])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "demo", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "demo", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"model": "demo", "prompt": "x", "colour": 1}, 400, "colour"),
        ({"model": "demo", "prompt": [5] * 9000}, 400, "prompt"),
        ({"model": "nothing", "prompt": "x"}, 404, "model"),
        ({"prompt": "x"}, 400, "model"),
    ],
)
def test_bad_input_is_named(split: Deployment, body: dict[str, object], status: int, param: str) -> None:
    answer = httpx.post(f"{split.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_nothing_stays_booked_or_used(split: Deployment) -> None:
    def is_idle() -> bool:
        workers = split.health()["models"]["demo"]["workers"].values()
        return all(w["running"] == 0 and w["waiting"] == 0 and w["used_block_count"] == 0 for w in workers)

    split.wait_for(is_idle, "every block to be free again")
