"""Requests of the official client, from the socket to the workers' protocol and back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from polyphase.frontend.models import ServedModel
from polyphase.wire.cards import Role

from .conftest import STORY
from .stack import SPLIT_FROM, Stack, wait_for

MESSAGES: Any = [{"role": "user", "content": "tell"}]
LONG: Any = [{"role": "user", "content": "tell me the story of the lazy dog again, and leave nothing out " * 2}]


async def streamed(stack: Stack, **fields: Any) -> list[Any]:
    stream = await stack.client().chat.completions.create(model="tiny", stream=True, **{"messages": MESSAGES, **fields})
    return [chunk async for chunk in stream]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_chat_whole(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.eos_after = 12
    worker.behaviour.cached_tokens = 3
    answer = await stack.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert STORY.startswith(answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == 13
    assert usage.prompt_tokens == len(worker.submits[0].token_ids)
    assert usage.total_tokens == usage.prompt_tokens + 13
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
async def test_chat_streamed_is_chat_whole(stack: Stack, tokens_per_step: int) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.tokens_per_step = tokens_per_step
    whole = await stack.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40)
    chunks = await streamed(stack, max_tokens=40, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert sum(1 for c in chunks if c.choices and c.choices[0].finish_reason) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    assert "\ufffd" not in text_of(chunks)


async def test_usage_in_every_chunk(stack: Stack) -> None:
    await stack.add("worker-0")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await streamed(stack, max_tokens=5, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_max_tokens_defaults(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.tokens_per_step = 100
    await stack.client().chat.completions.create(model="tiny", messages=MESSAGES)
    await stack.client().completions.create(model="tiny", prompt="tell")
    chat, completion = worker.submits
    assert chat.stop.max_tokens == 512 - len(chat.token_ids)
    assert completion.stop.max_tokens == 16


async def test_sampling_fields_reach_the_worker(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [7], "min_tokens": 2, "ignore_eos": True,
             "cache_salt": "tenant", "priority": 3}  # fmt: skip
    await stack.client().completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0.5, top_p=0.9, seed=11, presence_penalty=0.1, frequency_penalty=0.2,
        logit_bias={"5": -100}, stop=["zzz"], extra_body=extra,
    )  # fmt: skip
    [submit] = worker.submits
    sampling, stop = submit.sampling, submit.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 0.9, 5, 0.1, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.2)
    assert sampling.logit_bias == {5: -100}
    assert (stop.max_tokens, stop.min_tokens, stop.ignore_eos, stop.stop_token_ids, stop.stop_strings) == (4, 2, True, [7], ["zzz"])
    assert (submit.token_ids, submit.cache_salt, submit.priority) == ([5, 6, 7], "tenant", 3)


async def test_defaults_of_sampling_come_from_the_card(stack: Stack) -> None:
    import msgspec

    card = msgspec.structs.replace(stack.card, default_temperature=0.6, default_top_p=0.95, default_top_k=20)
    worker = await stack.add("worker-0", card=card)
    await stack.client().completions.create(model="tiny", prompt="tell")
    await stack.client().completions.create(model="tiny", prompt="tell", temperature=0, extra_body={"top_k": -1})
    given, overridden = (submit.sampling for submit in worker.submits)
    assert (given.temperature, given.top_p, given.top_k) == (0.6, 0.95, 20)
    assert (overridden.temperature, overridden.top_p, overridden.top_k) == (0.0, 0.95, 0)
    assert given.seed != overridden.seed


async def test_several_choices_have_seeds_of_their_own(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    chunks = await streamed(stack, n=3, max_tokens=6, seed=5)
    texts = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)]
    assert len(set(texts)) == 1
    assert texts[0]
    assert [sum(1 for c in chunks if c.choices[0].index == i and c.choices[0].finish_reason) for i in range(3)] == [1, 1, 1]
    seeds = {submit.sampling.seed for submit in worker.submits}
    assert len(seeds) == 3
    assert 5 in seeds
    whole = await stack.client().chat.completions.create(model="tiny", messages=MESSAGES, n=3, max_tokens=6, seed=5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {submit.sampling.seed for submit in worker.submits} == seeds, "the same seed gives the same seeds again"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 18
    assert whole.usage.prompt_tokens == len(worker.submits[0].token_ids)


@pytest.mark.parametrize("prompt", [["tell", "me"], [[5, 6], [7, 8]]])
async def test_several_prompts(stack: Stack, prompt: Any) -> None:
    await stack.add("worker-0")
    answer = await stack.client().completions.create(model="tiny", prompt=prompt, n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.object == "text_completion"


async def test_echo_returns_the_prompt(stack: Stack) -> None:
    await stack.add("worker-0")
    client = stack.client()
    plain = await client.completions.create(model="tiny", prompt="once: ", max_tokens=5)
    echoed = await client.completions.create(model="tiny", prompt="once: ", max_tokens=5, echo=True)
    assert echoed.choices[0].text == "once: " + plain.choices[0].text
    stream = await client.completions.create(model="tiny", prompt="once: ", max_tokens=5, echo=True, stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == echoed.choices[0].text


@pytest.mark.parametrize("engine_looks", [True, False])
async def test_a_stop_string_cuts_the_text_and_the_work(stack: Stack, engine_looks: bool) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.checks_stop_strings = engine_looks
    worker.behaviour.step_s = 0.001
    chunks = await streamed(stack, stop=["fox jumps", "never"], max_tokens=400)
    assert text_of(chunks) == "The quick brown "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == "fox jumps"
    await wait_for(lambda: stack.is_at_rest)
    assert bool(worker.cancels) is not engine_looks, "an engine that does not look for stop strings must be told"
    kept = await stack.client().chat.completions.create(
        model="tiny", messages=MESSAGES, stop="fox jumps", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == "The quick brown fox jumps"


async def test_a_stop_token_is_not_shown(stack: Stack, story: list[int], model: ServedModel) -> None:
    await stack.add("worker-0")
    stop = story[5]
    shown = model.tokenizer.decode(story[: story.index(stop)])
    answer = await stack.client().completions.create(model="tiny", prompt="x", extra_body={"stop_token_ids": [stop]})
    assert answer.choices[0].text == shown
    assert answer.choices[0].stop_reason == stop  # type: ignore[attr-defined]
    assert answer.choices[0].finish_reason == "stop"


async def test_the_token_that_ends_is_counted_and_not_shown(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.eos_after = 4
    answer = await stack.client().completions.create(model="tiny", prompt="x", extra_body={"skip_special_tokens": False})
    assert "<|end|>" not in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


async def test_chat_logprobs(stack: Stack, story: list[int], model: ServedModel) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.tokens_per_step = 4
    fields: Any = {"logprobs": True, "top_logprobs": 2, "max_tokens": 10}
    whole = await stack.client().chat.completions.create(model="tiny", messages=MESSAGES, **fields)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert [bytes(entry.bytes or []) for entry in content] == [model.tokenizer.token_bytes(i) for i in story[:10]]
    assert [len(entry.top_logprobs) for entry in content] == [2] * 10
    assert content[0].logprob == -0.5
    chunks = await streamed(stack, **fields)
    entries = [entry for c in chunks for entry in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert entries == content


async def test_completion_logprobs(stack: Stack, story: list[int], model: ServedModel) -> None:
    await stack.add("worker-0")
    answer = await stack.client().completions.create(model="tiny", prompt="x", max_tokens=6, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = [model.tokenizer.token_text(i) for i in story[:6]]
    assert logprobs.tokens == tokens
    assert logprobs.text_offset == [len("".join(tokens[:i])) for i in range(6)]
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs == [-0.5] * 6
    stream = await stack.client().completions.create(model="tiny", prompt="x", max_tokens=6, logprobs=2, stream=True)
    offsets = [offset async for c in stream if c.choices[0].logprobs for offset in c.choices[0].logprobs.text_offset or []]
    assert offsets == logprobs.text_offset


async def test_token_ids_on_request(stack: Stack, story: list[int]) -> None:
    worker = await stack.add("worker-0")
    extra = {"return_token_ids": True}
    answer: Any = await stack.client().completions.create(model="tiny", prompt=[5, 6], max_tokens=4, extra_body=extra)
    assert answer.choices[0].token_ids == story[:4]
    assert answer.choices[0].prompt_token_ids == [5, 6]
    stream = await stack.client().completions.create(model="tiny", prompt=[5, 6], max_tokens=4, extra_body=extra, stream=True)
    chunks: list[Any] = [chunk async for chunk in stream]
    assert [i for c in chunks for i in c.choices[0].token_ids] == story[:4]
    assert chunks[0].choices[0].prompt_token_ids == [5, 6]
    chat: Any = await stack.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, extra_body=extra)
    assert chat.choices[0].token_ids == story[:4]
    assert chat.prompt_token_ids == worker.submits[-1].token_ids


async def test_a_long_prompt_is_split_and_handed_over(stack: Stack) -> None:
    prefill = await stack.add("prefill-0", Role.PREFILL)
    decode = await stack.add("decode-0", Role.DECODE)
    raw = await stack.client().chat.completions.with_raw_response.create(model="tiny", messages=LONG, max_tokens=30)
    answer = raw.parse()
    assert (STORY * 3).startswith(answer.choices[0].message.content or "?")
    assert raw.headers["x-polyphase-prefill-worker"] == "prefill-0"
    assert raw.headers["x-polyphase-decode-worker"] == "decode-0"
    [first], [second] = prefill.submits, decode.submits
    assert first.hand_over
    assert not second.hand_over
    assert second.offer is not None
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert len(second.token_ids) == len(first.token_ids) + 1
    assert second.sampling == first.sampling
    record = await stack.record(raw.headers["x-request-id"])
    assert record["split"] is True
    assert record["prefill_worker"] == "prefill-0"
    assert record["kv_bytes_moved"] == 4096
    assert record["transferred_tokens"] == len(first.token_ids)
    assert record["completion_tokens"] == 30
    assert record["status"] == "finished"
    assert {candidate["leg"] for candidate in record["candidates"]} == {"prefill", "decode"}
    await wait_for(lambda: stack.is_at_rest)


async def test_a_short_prompt_stays_on_the_decode_worker(stack: Stack) -> None:
    prefill = await stack.add("prefill-0", Role.PREFILL)
    await stack.add("decode-0", Role.DECODE)
    raw = await stack.client().completions.with_raw_response.create(model="tiny", prompt=[5] * (SPLIT_FROM - 1), max_tokens=3)
    assert raw.headers["x-polyphase-prefill-worker"] == raw.headers["x-polyphase-decode-worker"] == "decode-0"
    assert prefill.submits == []


async def test_a_request_that_ends_with_its_first_token_is_not_handed_over(stack: Stack) -> None:
    await stack.add("prefill-0", Role.PREFILL)
    decode = await stack.add("decode-0", Role.DECODE)
    answer = await stack.client().chat.completions.create(model="tiny", messages=LONG, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert decode.submits == []
    await wait_for(lambda: stack.is_at_rest)


async def test_the_first_token_is_streamed_before_the_decode_worker_answers(stack: Stack) -> None:
    await stack.add("prefill-0", Role.PREFILL)
    decode = await stack.add("decode-0", Role.DECODE)
    decode.behaviour.is_stalled = True
    stream = await stack.client().chat.completions.create(model="tiny", messages=LONG, max_tokens=9, stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].delta.role == "assistant"
    await stream.close()
    await wait_for(lambda: stack.is_at_rest)


async def test_many_at_once(stack: Stack) -> None:
    for worker_id in ("worker-0", "worker-1"):
        (await stack.add(worker_id)).behaviour.step_s = 0.001
    client = stack.client()

    async def ask(i: int) -> str | None:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10 + i)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 10 + i
        return answer.choices[0].message.content

    texts = await asyncio.gather(*map(ask, range(40)))
    assert all((STORY * 3).startswith((text or "?").rstrip("\ufffd")) for text in texts)
    assert all(worker.submits for worker in stack.workers.values())
    await wait_for(lambda: stack.is_at_rest)


async def test_models_come_and_go(stack: Stack) -> None:
    client = stack.client()
    assert [model.id async for model in await client.models.list()] == []
    await stack.add("worker-0")
    assert [model.id async for model in await client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "polyphase"
    assert (await stack.get("/v1/models/other")).status_code == 404
    await stack.kill("worker-0")
    await wait_for(lambda: not stack.services.models.names())
    assert [model.id async for model in await client.models.list()] == []


async def test_a_long_text_is_tokenised_in_a_thread(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    to_thread = asyncio.to_thread

    async def noted(*args: Any) -> Any:
        threads.append(args[0])
        return await to_thread(*args)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    await stack.add("worker-0")
    before = len(threads)
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": "word " * 20_000})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(threads) == before + 1
