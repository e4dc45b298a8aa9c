"""Several models behind one frontend: names, aliases, adapters, and workers that differ under one name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest

from polyphase.core.errors import ConfigurationError, ModelNotFound, NoWorkers
from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.frontend.models import Models, NameKind, ServedModel
from polyphase.wire.cards import ModelCard, Role
from polyphase.wire.events import BlocksStored

from .fake_worker import FakeWorker
from .stack import Stack, wait_for

MakeCard = Callable[..., ModelCard]


@pytest.fixture
def other(card: ModelCard) -> MakeCard:
    return lambda **changes: msgspec.structs.replace(card, **changes)


async def ask(stack: Stack, model: str, prompt: str | list[int] = "The quick", **more: Any) -> Any:
    return await stack.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 3, **more})


async def listed(stack: Stack) -> dict[str, tuple[str, str | None]]:
    page = (await stack.get("/v1/models")).json()
    return {entry["id"]: (entry["root"], entry["parent"]) for entry in page["data"]}


# Names


async def test_an_alias_is_served_listed_and_answered_as_it_was_asked_for(stack: Stack) -> None:
    worker = await stack.add("w", aliases=["gpt-4", "gpt-4o"])
    assert await listed(stack) == {"tiny": ("tiny", None), "gpt-4": ("tiny", None), "gpt-4o": ("tiny", None)}
    client = stack.client()
    answer = await client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}], max_tokens=3)
    assert answer.model == "gpt-4"
    stream = await client.completions.create(model="gpt-4o", prompt="x", max_tokens=2, stream=True)
    assert {chunk.model async for chunk in stream} == {"gpt-4o"}
    assert (await client.models.retrieve("gpt-4")).id == "gpt-4"
    assert len(worker.submits) == 2
    record = await stack.record(answer.id)
    assert (record["model"], record["asked_for"]) == ("tiny", "gpt-4")
    assert 'requests_total{endpoint="chat.completions",model="tiny",status="finished"}' in (await stack.get("/metrics")).text


async def test_names_come_and_go_with_the_workers_that_bring_them(stack: Stack) -> None:
    await stack.add("w0")
    await stack.add("w1", aliases=["gpt-4"])
    await stack.kill("w1")
    await wait_for(lambda: stack.services.models.names() == ["tiny"])
    gone = await ask(stack, "gpt-4")
    assert (gone.status_code, gone.headers["retry-after"]) == (503, "5")
    assert "no worker serves the model 'gpt-4'" in gone.json()["error"]["message"]
    assert (await stack.get("/v1/models/gpt-4")).status_code == 404
    never = await ask(stack, "gpt-5")
    assert (never.status_code, never.json()["error"]["code"]) == (404, "model_not_found")
    assert (await ask(stack, "tiny")).status_code == 200


async def test_two_models_are_apart(stack: Stack, other: MakeCard) -> None:
    one = await stack.add("w0")
    two = await stack.add("w1", card=other(name="second"))
    for _ in range(3):
        assert (await ask(stack, "second")).json()["model"] == "second"
    assert (len(one.submits), len(two.submits)) == (0, 3)
    await stack.kill("w1")
    await wait_for(lambda: stack.services.models.names() == ["tiny"])
    assert (await ask(stack, "second")).status_code == 503
    page = (await stack.get("/health")).json()
    assert (page["status"], page["models"]["tiny"]["is_ready"], list(page["models"])) == ("healthy", True, ["tiny"])


@pytest.mark.parametrize(
    ("changes", "entry", "sentence"),
    [
        ({"name": "gpt-4"}, {}, "brings 'gpt-4' as a model, and that is an alias of the model 'tiny' already"),
        ({"name": "second"}, {"aliases": ["tiny"]}, "brings 'tiny' as an alias of 'second', and that is a model already"),
        (
            {"name": "second"},
            {"aliases": ["gpt-4"]},
            "brings 'gpt-4' as an alias of 'second', and that is an alias of the model 'tiny'",
        ),
        (
            {"name": "second", "adapters": ["sql"]},
            {},
            "brings 'sql' as a LoRA adapter of 'second', and that is a LoRA adapter of",
        ),
        ({"adapters": ["gpt-4"]}, {}, "brings 'gpt-4' as a LoRA adapter of 'tiny', and that is an alias of the model 'tiny' already"),
        ({"adapters": ["x"]}, {"aliases": ["x"]}, "uses 'x' for an alias and a LoRA adapter"),
    ],
)
async def test_a_worker_whose_names_mean_something_else_already_is_turned_away(
    changes: dict[str, Any], entry: dict[str, Any], sentence: str, stack: Stack, other: MakeCard
) -> None:
    await stack.add("w0", aliases=["gpt-4"], card=other(adapters=["sql"]))
    await stack.add_unready("w1", card=other(**changes), **entry)
    await wait_for(stack.services.turned_away)
    assert sentence in stack.services.turned_away()["w1"]
    await stack.kill("w1")
    await wait_for(lambda: not stack.services.turned_away())
    assert (await ask(stack, "gpt-4")).status_code == 200


def test_names_without_a_frontend(card: ModelCard) -> None:
    models = Models()
    with pytest.raises(NoWorkers):
        models.resolve("tiny")
    model = ServedModel.of(card)
    models.add_worker("w0", model, aliases=["a", "tiny"])
    assert [(one.name, one.kind, one.true_name) for one in models] == [("tiny", NameKind.MODEL, "tiny"), ("a", NameKind.ALIAS, "tiny")]
    with pytest.raises(ModelNotFound, match="served are: tiny, a"):
        models.resolve("b")
    with pytest.raises(ConfigurationError):
        models.add_worker("w1", model, msgspec.structs.replace(card, adapters=["tiny"]))
    models.remove_worker("w0")
    with pytest.raises(NoWorkers):
        models.resolve("a")


# Workers that differ under one name


async def test_the_shortest_context_is_the_models(stack: Stack, other: MakeCard) -> None:
    await stack.add("w0")
    await stack.add("w1", card=other(context_length=100, engine="another"))
    assert (await stack.get("/v1/models/tiny")).json()["max_model_len"] == 100
    refused = await ask(stack, "tiny", [1] * 120)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    await stack.kill("w1")
    await wait_for(lambda: [one.model.card.context_length for one in stack.services.models] == [512])
    assert (await ask(stack, "tiny", [1] * 120)).status_code == 200


async def test_prefixes_are_found_in_blocks_of_every_size(stack: Stack, other: MakeCard) -> None:
    await stack.add("w0")
    large = await stack.add("w1", card=other(block_size=64, engine="another"))
    prompt = [number % 200 for number in range(200)]
    await hold(stack, large, sequence_hashes(prompt, 64))
    for _ in range(4):
        answer = await ask(stack, "tiny", prompt)
        assert answer.headers["x-polyphase-decode-worker"] == "w1"
        assert answer.headers["x-polyphase-predicted-cached-tokens"] == "192"
    candidates = (await stack.record(answer.json()["id"]))["candidates"]
    assert {row["worker"]: row["tokens_to_compute"] for row in candidates} == {"w0": 200, "w1": 8}


async def hold(stack: Stack, worker: FakeWorker, hashes: list[Any]) -> None:
    worker.publish([BlocksStored(list(hashes))])
    await wait_for(lambda: stack.router.indexed_block_count(worker.worker_id) == len(hashes))  # type: ignore[arg-type]


async def test_a_request_goes_on_at_a_worker_with_other_blocks(stack: Stack, other: MakeCard) -> None:
    first = await stack.add("w0", card=other(block_size=32, engine="another"))
    first.behaviour.fails_after = 2
    second = await stack.add("w1", Role.BOTH)
    second.behaviour.fails_after = None
    texts = set()
    for _ in range(4):
        answer = await ask(stack, "tiny", list(range(1, 100)), max_tokens=6)
        assert answer.status_code == 200
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1
    assert any(len(submit.token_ids) > submit.prompt_token_count for submit in second.submits)


async def test_shares_show_on_the_health_page_and_in_the_record(stack: Stack, other: MakeCard) -> None:
    await stack.add("w0", group="stable", weight=3.0)
    await stack.add("w1", group="canary", weight=1.0)
    answers = [await ask(stack, "tiny", [number] * 40) for number in range(8)]
    workers = [answer.headers["x-polyphase-decode-worker"] for answer in answers]
    assert (workers.count("w0"), workers.count("w1")) == (6, 2)
    assert (await stack.get("/health")).json()["models"]["tiny"]["weights"] == {"stable": 3.0, "canary": 1.0}
    records = [await stack.record(answer.json()["id"]) for answer in answers]
    assert any(row["costs"].get("share") for record in records for row in record["candidates"])
    assert {row["group"] for row in records[0]["candidates"]} == {"stable", "canary"}


# Adapters


async def test_an_adapter_is_a_model_of_its_own(stack: Stack, other: MakeCard) -> None:
    plain = await stack.add("w0")
    able = await stack.add("w1", card=other(adapters=["sql", "poet"]))
    assert (await listed(stack))["sql"] == ("sql", "tiny")
    prompt = list(range(1, 65))
    for _ in range(3):
        assert (await ask(stack, "sql", prompt, cache_salt="t")).json()["model"] == "sql"
    assert (len(plain.submits), {submit.lora for submit in able.submits}) == (0, {"sql"})
    record = (await stack.get("/debug/requests?limit=1")).json()["data"][0]
    assert (record["model"], record["asked_for"]) == ("sql", None)
    await ask(stack, "tiny", prompt)
    assert [submit.lora for worker in (plain, able) for submit in worker.submits].count(None) == 1
    await stack.kill("w1")
    await wait_for(lambda: stack.services.models.names() == ["tiny"])
    assert (await ask(stack, "sql", prompt)).status_code == 503
    assert (await ask(stack, "tiny", prompt)).status_code == 200


async def test_prefixes_of_an_adapter_are_its_own(stack: Stack, other: MakeCard) -> None:
    worker = await stack.add("w", card=other(adapters=["sql"]))
    prompt = list(range(1, 65))
    await hold(stack, worker, sequence_hashes(prompt, 16, namespace_of("t", "sql")))
    predicted = {}
    for model, salt in (("sql", "t"), ("sql", "u"), ("tiny", "t")):
        answer = await ask(stack, model, prompt, cache_salt=salt)
        predicted[model, salt] = int(answer.headers["x-polyphase-predicted-cached-tokens"])
    assert predicted == {("sql", "t"): 48, ("sql", "u"): 0, ("tiny", "t"): 0}


async def test_no_salt_can_be_taken_for_an_adapter(stack: Stack, other: MakeCard) -> None:
    worker = await stack.add("w", card=other(adapters=["sql"]))
    refused = await ask(stack, "tiny", cache_salt=namespace_of(None, "sql"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")
    assert worker.submits == []


async def test_the_sdk_lists_and_names_models(stack: Stack, other: MakeCard) -> None:
    await stack.add("w", aliases=["gpt-4"], card=other(adapters=["sql"]))
    client = stack.client()
    assert [model.id async for model in client.models.list()] == ["tiny", "gpt-4", "sql"]
    with pytest.raises(openai.NotFoundError, match="served are: tiny, gpt-4, sql"):
        await client.completions.create(model="nope", prompt="x")
    assert json.loads((await stack.get("/health")).content)["models"]["tiny"]["names"] == ["tiny", "gpt-4", "sql"]
