"""On what terms a request is served: who asks, and until when the answer is of use. From headers and body, before anything is started.

tenant      header x-polyphase-tenant, else the API key (as a digest), else the field `user`, else "default"
deadline    header x-polyphase-deadline-ms, counted from when the request came, else the server's own timeout
leave by    when it must have been sent to a worker: its deadline, the longest wait in the queue, or what the OpenAI client says it
            waits for the first byte (header x-stainless-read-timeout), whichever is first
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from starlette.types import Scope

from polyphase.core.errors import InvalidRequest
from polyphase.frontend.bodies import header
from polyphase.frontend.settings import FrontendSettings

DEFAULT_TENANT = "default"
TENANT_HEADER, DEADLINE_HEADER = "x-polyphase-tenant", "x-polyphase-deadline-ms"
CLIENT_TIMEOUT_HEADER = "x-stainless-read-timeout"  # seconds. Source: openai-python, _base_client.py
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000
_TENANT = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")
_CLIENT_TIMEOUT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Terms:
    """Times are of the frontend's monotonic clock, set once."""

    tenant: str
    deadline_ns: int
    leave_by_ns: int

    @classmethod
    def usual(cls, settings: FrontendSettings, now_ns: int) -> Terms:
        """Of a request that asks for nothing special."""
        deadline_ns = now_ns + int(settings.request_timeout_s * 1e9)
        return cls(DEFAULT_TENANT, deadline_ns, min(deadline_ns, now_ns + int(settings.admission.max_wait_s * 1e9)))


def terms_of(scope: Scope, user: str | None, settings: FrontendSettings, received_ns: int) -> Terms:
    """Raises: InvalidRequest if a header of ours is malformed."""
    usual = Terms.usual(settings, received_ns)
    deadline_ns, leave_by_ns = usual.deadline_ns, usual.leave_by_ns
    wanted_ms = _deadline_ms(header(scope, DEADLINE_HEADER.encode()))
    if wanted_ms is not None:
        deadline_ns = min(deadline_ns, received_ns + wanted_ms * 1_000_000)
    patience_s = _client_timeout_s(header(scope, CLIENT_TIMEOUT_HEADER.encode()))
    if patience_s is not None:
        leave_by_ns = min(leave_by_ns, received_ns + int(patience_s * 1e9))
    return Terms(_tenant(scope, user), deadline_ns, min(leave_by_ns, deadline_ns))


def _tenant(scope: Scope, user: str | None) -> str:
    named = header(scope, TENANT_HEADER.encode())
    if named is not None:
        if not _TENANT.fullmatch(named):
            raise InvalidRequest(
                f"the header {TENANT_HEADER} must have 1 to 128 letters, digits or any of . _ : @ / -, not {named[:100]!r}",
                param=TENANT_HEADER,
            )
        return named
    scheme, _, key = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return f"key-{_digest(key.strip())}"
    return f"user-{_digest(user)}" if user else DEFAULT_TENANT


def _digest(text: str) -> str:
    """Keys and names of people go no further than this."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def _deadline_ms(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and 1 <= int(text) <= MAX_DEADLINE_MS):
        raise InvalidRequest(
            f"the header {DEADLINE_HEADER} must be a whole number of milliseconds between 1 and {MAX_DEADLINE_MS}, not {text[:50]!r}",
            param=DEADLINE_HEADER,
        )
    return int(text)


def _client_timeout_s(text: str | None) -> float | None:
    """A hint of the client's library, not written by a person: anything odd is ignored."""
    if text is None or not _CLIENT_TIMEOUT.fullmatch(text):
        return None
    seconds = float(text)
    return seconds if seconds > 0 and math.isfinite(seconds) else None
