"""A server that takes token ids and tells them is a worker like any other: the contract of all engines, and what it is not asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from polyphase.core.errors import InvalidRequest
from polyphase.engines.served.engine import ServedEngine
from polyphase.testing.engines import EngineConformance, stepping
from polyphase.wire.requests import FinishReason, Grammar, GrammarKind, SamplingParams, StopConditions, Submit
from tests.unit.openai.server import MODEL, VOCABULARY, Manner, OpenAIServer, token_at
from tests.unit.openai.server import serving as serving_server
from tests.unit.openai.stack import load, serving

PROMPT = list(range(100, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model's folder has besides weights: bytes, and words for the rest of the ids."""
    path = tmp_path_factory.mktemp("model") / "large"
    path.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: at for at, letter in enumerate(alphabet)}, **{f"word{at}": at for at in range(len(alphabet), VOCABULARY)}}
    inner = Library(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "eos_token_id": 0}))
    return path


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with serving_server(Manner(takes_ids=True)) as server:
        yield server


class TestOverTokens(EngineConformance):
    @pytest.fixture
    async def engine(self, folder: Path, server: OpenAIServer) -> ServedEngine:
        server.manner.pause_s = 0.002
        return await load(server, model=str(folder))


def request(request_id: str, **fields: object) -> Submit:
    given = {"sampling": SamplingParams(seed=1, temperature=0.0), "stop": StopConditions(max_tokens=6, ignore_eos=True), **fields}
    return Submit(request_id=request_id, token_ids=PROMPT, prompt_token_count=len(PROMPT), **given)  # type: ignore[arg-type]


async def test_what_the_server_does_not_know_is_refused_and_not_left_out(folder: Path, server: OpenAIServer) -> None:
    engine = await load(server, model=str(folder))
    server.seen.clear()
    refused = {
        "top_k": {"sampling": SamplingParams(seed=1, temperature=1.0, top_k=5)},
        "min_tokens": {"stop": StopConditions(max_tokens=6, min_tokens=2, ignore_eos=True)},
        "cache_salt": {"cache_salt": "tenant"},
    }
    with pytest.raises(InvalidRequest):
        engine.submit(request("grammar", grammar=Grammar(GrammarKind.JSON, "")))
    async with stepping(engine) as run:
        for name, fields in refused.items():
            engine.submit(request(name, **fields))
            end = await run.end(name)
            assert end.failure is not None
            assert name in end.failure.message
            assert not end.failure.is_retryable
        engine.submit(request("greedy", sampling=SamplingParams(seed=1, temperature=0.0, top_k=5)))
        assert (await run.end("greedy")).finish_reason is FinishReason.LENGTH, "top_k changes nothing there"
    assert len(server.seen) == 1
    assert server.seen[0].fields["model"] == MODEL


async def test_a_server_without_ids_is_given_text(folder: Path) -> None:
    async with serving_server(Manner(takes_ids=False)) as server:
        engine = await load(server, model=str(folder))
    assert not engine.card.takes_tokens
    assert engine.card.passes


async def test_tokens_and_bodies_side_by_side(folder: Path, server: OpenAIServer) -> None:
    """The frontend tokenises what is text, and passes the image on; the engine's answer to it has its own text."""
    async with serving(None, server, model=str(folder)) as served:
        body = {"model": "large", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = await served.post("/v1/completions", body)
        assert answer.json()["choices"][0]["token_ids"] == [token_at(100 + at) for at in range(4)]
        assert answer.json()["model"] == "large"
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        chat = {"model": "large", "messages": [{"role": "user", "content": [picture]}], "max_tokens": 3}
        answer = await served.post("/v1/chat/completions", chat)
        assert answer.json()["choices"][0]["message"]["content"] == "Once upon a"
        assert (await served.latest_record())["passed_through"] == "images"
        text = await served.post("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": '"image_url"'}]})
        assert "has no chat template" in text.json()["error"]["message"], "text about an image is text"
