"""Polyphase before a real vLLM as before any OpenAI-compatible server: as text, as tokens, and what it passes through. See real_vllm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI

from polyphase.testing import Deployment
from tests.engines.vllm_setting import KEYLESS, MODEL, START_TIMEOUT_S, engine_urls, options

HELLO = [{"role": "user", "content": "kabas loden " * 40}]
PROMPT = [100 + (7 * place) % 900 for place in range(300)]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]


def engine_url(vllm: Deployment) -> str:
    return engine_urls(vllm)["worker-0"]


@pytest.fixture(scope="module")
def vllm() -> Iterator[Deployment]:
    with Deployment(MODEL, *options(), start_timeout_s=START_TIMEOUT_S, environment=KEYLESS) as deployment:
        yield deployment


@pytest.fixture(scope="module", params=["text", "tokens"])
def served(request: pytest.FixtureRequest, vllm: Deployment) -> Iterator[Deployment]:
    model = "tiny" if request.param == "text" else MODEL
    options = ("--served-model-name", "x", "--engine", "openai", "--attach", engine_url(vllm))
    with Deployment(model, *options, start_timeout_s=120) as deployment:
        way = "tokens in, tokens out" if request.param == "tokens" else "text"
        assert f": {way}; takes chat, completions" in deployment.logs(), deployment.logs()
        yield deployment


def client_of(served: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_answers_are_those_of_the_engine_asked_directly(served: Deployment, vllm: Deployment) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    direct = httpx.post(
        f"{engine_urls(vllm)['worker-0']}/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields}, timeout=120
    ).json()
    answer = client_of(served).chat.completions.create(model="x", messages=HELLO, **fields)  # type: ignore[call-overload]
    assert answer.model == "x"
    assert answer.choices[0].message.content == direct["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == direct["usage"]["prompt_tokens"]
    body = {"prompt": PROMPT, "ignore_eos": True, "return_token_ids": True, **fields}
    direct = httpx.post(f"{engine_urls(vllm)['worker-0']}/v1/completions", json={"model": "tiny", **body}, timeout=120).json()
    through = httpx.post(f"{served.url}/v1/completions", json={"model": "x", **body}, timeout=120).json()
    assert through["choices"][0]["token_ids"] == direct["choices"][0]["token_ids"]


def test_a_stream(served: Deployment) -> None:
    options = {"include_usage": True}
    chunks = list(
        client_of(served).chat.completions.create(  # type: ignore[call-overload]
            model="x", messages=HELLO, temperature=0, max_tokens=12, stream=True, stream_options=options
        )
    )
    assert {chunk.model for chunk in chunks} == {"x"}
    assert chunks[-1].usage.completion_tokens == 12
    assert len(chunks) > 3, "it is streamed; on a busy machine several tokens come at once"


def test_who_goes_away_frees_the_engine(served: Deployment, vllm: Deployment) -> None:
    stream = client_of(served).chat.completions.create(
        model="x",
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()

    def is_idle() -> bool:
        lines = httpx.get(f"{engine_urls(vllm)['worker-0']}/metrics", timeout=30).text.splitlines()
        return any(line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0") for line in lines)

    served.wait_for(is_idle, "the engine to be idle; 3000 tokens take much longer", timeout_s=15)


def test_what_a_model_of_text_does_not_take(served: Deployment, vllm: Deployment) -> None:
    """As found by asking vLLM; behind its own adapter as well."""
    for deployment, model in ((served, "x"), (vllm, "tiny")):
        client = client_of(deployment)
        with pytest.raises(APIStatusError, match="takes images; they take: chat, completions") as raised:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": [PICTURE]}])  # type: ignore[list-item, misc]
        assert raised.value.status_code == 400
        with pytest.raises(APIStatusError, match="takes embeddings"):
            client.embeddings.create(model=model, input="a")
