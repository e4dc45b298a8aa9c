"""Requests passed through to servers that take text only: chat, completions, embeddings, images, sounds; whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from polyphase.cli.retelling import paragraphs
from polyphase.testing.engines import stepping
from polyphase.wire.requests import Forward
from tests.unit.frontend.stack import raw_connection, wait_for
from tests.unit.openai.server import MODEL, WORDS, Manner, OpenAIServer
from tests.unit.openai.server import serving as serving_server
from tests.unit.openai.stack import Served, load, serving

STORY = "".join(WORDS)
HELLO = [{"role": "user", "content": "hello"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with serving_server() as server:
        yield server


@pytest.fixture
async def served(server: OpenAIServer) -> AsyncIterator[Served]:
    async with serving(None, server) as served:
        yield served


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "large", "messages": HELLO, "max_tokens": 10, **fields}


async def test_what_a_server_takes_is_asked_of_it() -> None:
    async with serving_server(Manner(takes_images=False, has_rerank=False)) as server, serving(None, server) as served:
        card = served.workers["w0"].engine.card
        assert card.passes == ["chat", "completions", "embeddings", "transcriptions"]
        assert not card.takes_tokens
    async with serving_server() as server, serving(None, server) as served:
        assert {"images", "rerank"} <= set(served.workers["w0"].engine.card.passes)


async def test_chat_whole_and_streamed(served: Served, server: OpenAIServer) -> None:
    client = served.client()
    whole = await client.chat.completions.create(model="large", messages=HELLO, max_tokens=10)  # type: ignore[arg-type]
    assert (whole.model, whole.choices[0].message.content, whole.choices[0].finish_reason) == ("large", STORY, "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (10, 10)
    options = {"include_usage": True}
    stream = await client.chat.completions.create(
        model="large",
        messages=HELLO,
        max_tokens=10,
        stream=True,
        stream_options=options,  # type: ignore[arg-type]
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {"large"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == STORY
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10
    assert [one.fields["model"] for one in server.seen] == [MODEL, MODEL]
    assert served.frontend.is_at_rest


async def test_a_body_goes_there_as_it_came_but_for_the_name(served: Served, server: OpenAIServer) -> None:
    """Numbers, order and escapes are the client's own."""
    body = b'{"temperature": 1.10, "messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00"}] ,"model":"large","seed":12345678901}'
    answer = await served.frontend.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    sent = server.asked("/v1/chat/completions")[0].body
    assert b'"temperature":1.10,"messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00"}]' in sent
    assert b'"seed":12345678901' in sent
    assert json.loads(sent)["model"] == MODEL


async def test_completions_and_what_the_upstream_refuses(served: Served) -> None:
    client = served.client()
    answer = await client.completions.create(model="large", prompt="once", max_tokens=3)
    assert (answer.model, answer.choices[0].text) == ("large", "Once upon a")
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="large", messages=HELLO, n=9)  # type: ignore[arg-type]
    assert raised.value.body == {"message": "n must be at most 4", "type": "invalid_request_error", "param": None, "code": "invalid_n"}
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: top_k"):
        await client.chat.completions.create(model="large", messages=HELLO, extra_body={"top_k": 3})  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError, match="served are: large"):
        await client.completions.create(model="other", prompt="once")


async def test_embeddings_rerank_and_sounds(served: Served) -> None:
    client = served.client()
    found = await client.embeddings.create(model="large", input=["a", "b"], encoding_format="float")
    assert (found.model, [one.embedding for one in found.data]) == ("large", [[0.25] * 4] * 2)
    ranked = await served.post("/v1/rerank", {"model": "large", "query": "q", "documents": ["a", "b"]})
    assert [one["index"] for one in ranked.json()["results"]] == [0, 1]
    assert ranked.json()["model"] == "large"
    written = await client.audio.transcriptions.create(model="large", file=("a.wav", b"RIFF" + bytes(100_000)))
    assert written.text == "100004 bytes of sound"
    record = await served.latest_record()
    assert (record["endpoint"], record["passed_through"], record["status"]) == ("transcriptions", "transcriptions", "finished")


async def test_an_image_is_passed_on_and_explained(served: Served, server: OpenAIServer) -> None:
    content = [{"type": "text", "text": "what is this"}, PICTURE]
    answer = await served.client().chat.completions.create(
        model="large",
        messages=[{"role": "user", "content": content}],
        max_tokens=4,  # type: ignore[list-item, misc]
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 510
    assert server.seen[0].fields["messages"][0]["content"] == content
    record = await served.latest_record()
    assert record["reason"] == "passed through: chat, images"
    assert (record["rule"], record["passed_through"], record["prompt_tokens"]) == ("passed-through", "images", 510)
    told = " ".join(paragraphs(record))
    assert "passed through: images" in told
    metrics = served.frontend.services.metrics.text().decode()
    assert 'polyphase_frontend_passed_requests_total{kinds="images",model="large",status="finished"} 1.0' in metrics


async def test_what_nobody_takes_is_said(served: Served) -> None:
    answer = await served.post("/v1/score", {"model": "large", "text_1": "a", "text_2": "b"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "kind_not_served"
    assert "takes score; they take: chat, completions, embeddings, images, rerank, transcriptions" in error["message"]
    film = {"type": "video_url", "video_url": {"url": "https://example.org/film.mp4"}}
    answer = await served.post("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": [film]}]))
    assert answer.json()["error"]["param"] == "messages[0].content[0].type"
    assert "takes video" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/chat/completions", "{", "the body is not valid JSON"),
        ("/v1/chat/completions", "[1]", "the body must be a JSON object"),
        ("/v1/embeddings", "{}", "the field 'model' is required"),
        ("/v1/embeddings", '{"model": 3}', "model must be a string"),
        ("/v1/chat/completions", '{"model": "large", "messages": [], "stream": 3}', "stream must be a boolean"),
    ],
)
async def test_bad_bodies(served: Served, path: str, body: str, said: str) -> None:
    answer = await served.frontend.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


async def test_bad_forms(served: Served) -> None:
    head = {"content-type": "multipart/form-data; boundary=b"}
    for headers, body, status in (
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"", 400),
        (head, b"nothing", 400),
        (head, b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nlarge', 400),
        (head, b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n', 400),
    ):
        answer = await served.frontend.post("/v1/audio/transcriptions", content=body, headers=headers)
        assert answer.status_code == status, body
        assert answer.json()["error"]["message"]


async def test_headers_that_are_secret_or_of_the_connection_end_here(served: Served, server: OpenAIServer) -> None:
    headers = {
        "authorization": "Bearer client-key", "cookie": "a=b", "x-api-key": "k", "x-custom": "yes", "traceparent": "00-a-b-01",
        "x-forwarded-for": "10.0.0.1", "openai-organization": "org", "te": "trailers", "x-polyphase-tenant": "t",
    }  # fmt: skip
    await served.frontend.post("/v1/chat/completions", chat_body(), headers=headers)
    seen = server.seen[0].headers
    assert (seen["x-custom"], seen["traceparent"]) == ("yes", "00-a-b-01")
    assert not seen.keys() & {"authorization", "cookie", "x-api-key", "x-forwarded-for", "openai-organization", "te", "x-polyphase-tenant"}


async def test_a_disconnect_aborts_the_upstream(served: Served, server: OpenAIServer) -> None:
    server.manner.holds_after = 3
    stream = await served.client().chat.completions.create(model="large", messages=HELLO, stream=True)  # type: ignore[arg-type]
    await anext(aiter(stream))
    assert server.open_count == 1
    await stream.close()
    await wait_for(lambda: server.open_count == 0)
    await wait_for(lambda: served.frontend.is_at_rest)
    await wait_for(lambda: served.workers["w0"].engine.load().running_count == 0)
    assert (await served.latest_record())["status"] == "cancelled"


async def test_a_slow_client_fills_nobodys_memory(served: Served, server: OpenAIServer) -> None:
    """40 MB are to come, and the client does not read: the server is held up after what windows and socket buffers take."""
    server.manner.big_events = 2500
    body = json.dumps(chat_body(stream=True))
    connection = raw_connection(served.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    await wait_for(lambda: server.sent_bytes > 500_000)
    last = -1
    while server.sent_bytes != last:
        last = server.sent_bytes
        await asyncio.sleep(0.5)
    assert server.sent_bytes < 20_000_000
    connection.settimeout(20)

    def read_all() -> bytes:
        tail, size = b"", 0
        while b"[DONE]" not in tail:
            part = connection.recv(1 << 20)
            assert part, size
            size += len(part)
            tail = (tail + part)[-100:]
        return tail

    await asyncio.to_thread(read_all)
    assert server.sent_bytes > 40_000_000
    connection.close()


async def test_a_large_answer_comes_whole(served: Served, server: OpenAIServer) -> None:
    """Of 10 MB of JSON, what does not fit the buffer is passed on as it comes."""
    server.manner.embedding_size = 2_000_000
    answer = await served.post("/v1/embeddings", {"model": "large", "input": "a"})
    assert len(answer.json()["data"][0]["embedding"]) == 2_000_000


@pytest.mark.parametrize(("manner", "said"), [({"cut_after": 3}, "broke"), ({"ends_after": 3}, "ended its answer without saying why")])
async def test_a_stream_that_breaks_off_ends_with_an_error(served: Served, server: OpenAIServer, manner: dict[str, int], said: str) -> None:
    server.manner.pause_s = 0.05  # so that it has begun
    for name, value in manner.items():
        setattr(server.manner, name, value)
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{served.url}/v1/chat/completions", json=chat_body(stream=True))
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert said in json.loads(events[-2][6:])["error"]["message"]
    assert len(events) == 5
    assert (await served.latest_record())["status"] == "failed"


async def test_a_client_that_never_reads_is_given_up(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyphase.frontend.relay.WRITE_GRACE_S", 0.2)
    server.manner.big_events = 2500
    async with serving(None, server, timeout_s=1) as served:
        body = json.dumps(chat_body(stream=True))
        connection = raw_connection(served.url)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        await wait_for(lambda: server.open_count == 1)
        await wait_for(lambda: server.open_count == 0)
        await wait_for(lambda: served.frontend.services.door.inside_count == 0)
        assert served.frontend.is_at_rest
        connection.close()


async def test_a_long_answer_is_progress_while_the_server_is_there(served: Served, server: OpenAIServer) -> None:
    """Nobody sees a step of it; without the server's word, the worker would be taken for stuck."""
    server.manner.pause_s = 3.0
    engine = served.workers["w0"].engine
    task = asyncio.create_task(served.post("/v1/chat/completions", chat_body()))
    await wait_for(lambda: engine.load().running_count == 1)
    step = engine.load().step
    await wait_for(lambda: engine.load().step >= step + 2)
    assert (await task).status_code == 200
    load = engine.load()
    assert (load.finished_total, load.prompt_tokens_total, load.generated_tokens_total) == (1, 10, 10)


async def test_a_redirect_is_not_followed(served: Served, server: OpenAIServer) -> None:
    server.manner.fails = (307, {"location": "http://elsewhere/"}, "")
    answer = await served.post("/v1/chat/completions", chat_body())
    assert answer.status_code == 500
    assert "sends elsewhere (status 307)" in answer.json()["error"]["message"]


async def test_an_answer_calls_the_model_as_the_client_did(served: Served, server: OpenAIServer) -> None:
    for stream in (False, True):
        answer = await served.post("/v1/chat/completions", chat_body(model="big", stream=stream))
        assert '"model":"big"' in answer.text.replace(" ", "")
        assert MODEL not in answer.text
    assert {one.fields["model"] for one in server.seen} == {MODEL}
    record = await served.latest_record()
    assert (record["model"], record["asked_for"]) == ("large", "big")


async def test_an_adapter_is_asked_for_by_its_own_name(server: OpenAIServer) -> None:
    engine = await load(server)
    body = json.dumps(chat_body(model="polite")).encode()
    told = {"model": "polite", "lora": "polite", "wants_stream": False, "window": 1 << 20, "prompt_token_count": 1}
    async with stepping(engine) as run:
        engine.forward(Forward(request_id="a", kinds=["chat"], body=body, content_type="application/json", **told))  # type: ignore[arg-type]
        await run.end("a")
    passed = run.outputs("a")[0].passed
    assert passed is not None
    assert passed.status == 404
    assert b"The model `polite` does not exist" in passed.data
