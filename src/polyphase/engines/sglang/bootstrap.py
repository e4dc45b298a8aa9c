"""How one SGLang server computes a prompt for another: both legs run at the same time, and find each other by the number of a room.

    prefill worker ── offer: host, port, room ──► frontend ──► decode worker
         │ /generate, room                                          │ /generate, the same room
         ▼                                                          ▼
    prefill server ◄────────── bootstrap; then KV and the first token ───────── decode server

The prefill server samples the first token and gives it to the decode server, which tells it as its own: both get the same body. Such
servers do one half each; neither serves a whole request. Source: SGLang 0.5.23; recorded in tests/unit/sglang.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from polyphase.engines.served.dialect import Chunk
from polyphase.engines.sglang.dialect import GenerateDialect
from polyphase.wire.requests import Submit

LEASE_S = 300.0  # Source: SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT: how long a prefill waits for its decode leg
_ROOM_BITS = 62  # Source: below 2**63


class BootstrapPrefill:
    """Implements `PrefillDialect`. `host` and `port` of the prefill server's bootstrap, as decode servers reach it."""

    lease_s = LEASE_S

    def __init__(self, dialect: GenerateDialect, host: str, port: int, context_length: int) -> None:
        self._dialect = dialect
        self._host = host
        self._port = port
        self._context_length = context_length

    def early_params(self, request: Submit) -> dict[str, Any]:
        return {"bootstrap_host": self._host, "bootstrap_port": self._port, "bootstrap_room": secrets.randbits(_ROOM_BITS)}

    def prefill_body(self, request: Submit, early_params: dict[str, Any] | None) -> bytes:
        """All that bears on the first token is said here, as it is to the decode server."""
        length = len(request.token_ids)
        room = min(request.stop.max_tokens - (length - request.prompt_token_count), self._context_length - length)
        return msgspec.json.encode({**self._dialect.fields(request, room), **(early_params or {}), "stream": False})

    def read_prefill(self, body: bytes) -> Chunk:
        """Its one token is not for us: the decode leg tells it."""
        return self._dialect.read(body)
