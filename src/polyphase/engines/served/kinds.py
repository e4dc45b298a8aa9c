"""Which kinds of bodies a server takes, by sending it the smallest one of each. Blocking: before the loop.

    each kind                      200: it takes that
    a conversation with a medium   200, and its prompt has more tokens than without: else the medium was ignored

A kind costs a token or two, and one whose path does not exist nothing. Films are not tried: the smallest one is not small.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import httpx

from polyphase.engines.served import samples
from polyphase.engines.served.access import CHAT_PATH, USUAL_PATHS
from polyphase.wire.cards import RequestKind

log = logging.getLogger(__name__)

FIRST_TOKEN_TIMEOUT_S = 300.0  # a model may be loaded for it
TRIES, MAX_WAIT_S = 3, 20.0  # where a probe meets 429


def paths_taken(client: httpx.Client, model: str) -> dict[str, str]:
    """The path of each kind that the server takes for this model. Raises: httpx.HTTPError."""
    taken: dict[str, str] = {}
    prompt_tokens: int | None = None  # of the conversation without media
    for kind, body in samples.bodies(model).items():
        for path in USUAL_PATHS[kind]:
            response = post(client, path, body)
            if kind == RequestKind.CHAT and response.status_code == 400:
                response = post(client, path, _newer(body))
            if response.status_code == 200:
                taken[kind] = path
                prompt_tokens = _prompt_tokens(response) if kind == RequestKind.CHAT else prompt_tokens
                break
    for kind in (RequestKind.TRANSCRIPTIONS, RequestKind.TRANSLATIONS):
        path = USUAL_PATHS[kind][0]
        if client.post(path, timeout=FIRST_TOKEN_TIMEOUT_S, **samples.form(model)).status_code == 200:
            taken[kind] = path
    if RequestKind.CHAT in taken:
        for kind, body in samples.media_bodies(model).items():
            response = post(client, CHAT_PATH, body)
            if response.status_code == 400:
                response = post(client, CHAT_PATH, _newer(body))
            seen = _prompt_tokens(response)
            if response.status_code == 200 and (prompt_tokens is None or seen is None or seen > prompt_tokens):
                taken[kind] = CHAT_PATH
    return taken


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Tried again where the server asks to wait. Raises: httpx.HTTPError."""
    for place in range(TRIES):
        response = client.post(path, json=body, timeout=FIRST_TOKEN_TIMEOUT_S)
        if response.status_code != 429 or place == TRIES - 1:
            break
        asked = response.headers.get("retry-after", "1")
        time.sleep(min(float(asked) if asked.isdecimal() else 1.0, MAX_WAIT_S))
    log.debug("probe: POST %s: status %d", path, response.status_code)
    return response


def _newer(body: dict[str, Any]) -> dict[str, Any]:
    """Source: models at OpenAI that reason know only the newer name, and fail where they cannot write a few tokens."""
    return {**{name: value for name, value in body.items() if name != "max_tokens"}, "max_completion_tokens": 16}


def _prompt_tokens(response: httpx.Response) -> int | None:
    try:
        count = response.json()["usage"]["prompt_tokens"]
    except (ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) else None
