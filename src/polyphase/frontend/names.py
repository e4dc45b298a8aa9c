"""What a request is called: to the client, to the workers, and in the answer's `id`."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from polyphase.core.ids import RequestId, new_request_id

_USABLE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class RequestNames:
    """`shown` is the header `x-request-id`, the client's own if it sent a usable one. `internal` is unique whatever clients send."""

    shown: str
    internal: RequestId

    @classmethod
    def of(cls, client_id: str | None) -> RequestNames:
        if client_id is not None and _USABLE.fullmatch(client_id):
            return cls(client_id, RequestId(f"{client_id}-{secrets.token_hex(4)}"))
        created = new_request_id("req")
        return cls(created, created)

    def answer_id(self, prefix: str) -> str:
        """`id` of the answer's body, for example `chatcmpl-6f…`."""
        return f"{prefix}-{self.internal.removeprefix('req-')}"
