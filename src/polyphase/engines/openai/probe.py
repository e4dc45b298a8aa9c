"""What an OpenAI-compatible server can, by asking it. Blocking: before the loop.

    GET  /v1/models                              its models
    POST the smallest request of each kind       `served.kinds`
         token ids to /v1/completions            200, and ids in the stream as well: tokens in, tokens out

Each costs a token or two; kinds whose path does not exist cost nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.access import COMPLETIONS_PATH, Access
from polyphase.engines.served.kinds import paths_taken, post
from polyphase.engines.served.passages import message_of
from polyphase.wire.cards import RequestKind

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
# Beyond OpenAI's own; what a server refuses of them is not sent to it.
TOKEN_FIELDS: dict[str, Any] = {
    "ignore_eos": True,
    "min_tokens": 1,
    "stop_token_ids": [0],
    "top_k": 5,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "cache_salt": "probe",
}


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """Of a server that takes token ids and tells them."""

    fields: frozenset[str]  # of TOKEN_FIELDS, those that it takes
    has_logprobs: bool  # that name their tokens by id


@dataclass(slots=True)
class ServerFacts:
    model: str  # as requests have to call it
    context_length: int  # 0: not said
    paths: dict[str, str] = field(default_factory=dict)  # by kind that it takes
    tokens: TokenFacts | None = None
    has_health: bool = False  # at /health; else it is looked after by its list of models


class Prober:
    """One server and model. `access` holds the key."""

    def __init__(self, client: httpx.Client, access: Access) -> None:
        self._client = client
        self._access = access

    def models(self) -> list[dict[str, Any]] | None:
        """None: it does not tell. Raises: ModelLoadError if the key is wrong; httpx.HTTPError if it does not answer."""
        response = self._client.get("/v1/models")
        if response.status_code in (401, 403):
            raise ModelLoadError(
                f"the server at {self._client.base_url} refuses the API key, or wants one: put it into an environment variable "
                f"and name that with --engine-api-key-env ({self._said(response)})"
            )
        found = _object(response)
        listed = found.get("data") if response.status_code == 200 else None
        return [one for one in listed if isinstance(one, dict) and "id" in one] if isinstance(listed, list) else None

    def tokens(self, model: str) -> TokenFacts | None:
        """None: it takes no token ids, or does not tell those of its answer."""
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0, "return_token_ids": True, "stream": True}
        if not self._tells_ids(body):
            return None
        taken = {**TOKEN_FIELDS}
        if not self._tells_ids({**body, **taken}):
            taken = {name: value for name, value in TOKEN_FIELDS.items() if self._tells_ids({**body, name: value})}
        logprobs = {**body, "logprobs": 1, "return_tokens_as_token_ids": True}
        return TokenFacts(frozenset(taken), self._tells_ids(logprobs, b"token_id:"))

    def has_health(self) -> bool:
        return self._client.get("/health").status_code == 200

    def _tells_ids(self, body: dict[str, Any], mark: bytes = b"") -> bool:
        response = post(self._client, COMPLETIONS_PATH, body)
        return response.status_code == 200 and _has_ids(response.content) and mark in response.content

    def _said(self, response: httpx.Response) -> str:
        return self._access.hide(message_of(response.content[:4096])) or f"status {response.status_code}"


def probe(url: str, access: Access, wanted: str | None, others: tuple[str, ...] = ()) -> ServerFacts:
    """`wanted` is the server's name of the model; None: one of `others`, or its only one.

    Raises: ModelLoadError if it does not answer, does not serve that, or takes no request at all.
    """
    with httpx.Client(base_url=url, headers=access.headers(), timeout=TIMEOUT_S, trust_env=access.uses_proxies) as client:
        prober = Prober(client, access)
        try:
            facts = _chosen(prober.models(), wanted, others, url)
            facts.paths = paths_taken(client, facts.model)
            if RequestKind.COMPLETIONS in facts.paths:
                facts.tokens = prober.tokens(facts.model)
            facts.has_health = prober.has_health()
        except httpx.HTTPError as error:
            raise ModelLoadError(f"the server at {url} does not answer: {error or type(error).__name__}") from error
    if not facts.paths:
        raise ModelLoadError(f"the server at {url} answers none of the requests for the model {facts.model!r} that OpenAI's API has")
    return facts


def is_up(url: str, access: Access) -> bool:
    """It answers, and if it lists models, there are some: servers that load one, or wait for their own workers, have none yet."""
    try:
        with httpx.Client(base_url=url, headers=access.headers(), timeout=TIMEOUT_S, trust_env=access.uses_proxies) as client:
            response = client.get("/v1/models")
    except httpx.HTTPError:
        return False
    return response.status_code < 500 and _object(response).get("data") != []


def _chosen(listed: list[dict[str, Any]] | None, wanted: str | None, others: tuple[str, ...], url: str) -> ServerFacts:
    models = {str(one["id"]): one for one in listed or ()}
    names = [name for name in ((wanted,) if wanted is not None else others) if name in models]
    if not names and wanted is None and len(models) == 1:
        names = list(models)
    if not names and listed is None and (wanted or others):
        log.warning("the server at %s does not list its models (GET /v1/models)", url)
        names = [wanted or others[0]]
    if not names:
        asked = repr(wanted) if wanted is not None else " or ".join(map(repr, others))
        served = ", ".join(list(models)[:20]) or "nothing"
        raise ModelLoadError(f"the server at {url} does not serve {asked}, but {served}; name one of these as MODEL")
    told = models.get(names[0], {})
    length = next((told[name] for name in ("max_model_len", "context_length", "context_window") if isinstance(told.get(name), int)), 0)
    return ServerFacts(names[0], length)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _has_ids(stream: bytes) -> bool:
    """Whether chunks of a stream of completions tell token ids."""
    for line in stream.splitlines():
        if not line.startswith(b"data: {"):
            continue
        try:
            chunk = msgspec.json.decode(line[6:])
        except msgspec.DecodeError:
            return False
        if "error" in chunk:
            return False
        choices = chunk.get("choices") or []
        if choices and choices[0].get("token_ids"):
            return True
    return False
