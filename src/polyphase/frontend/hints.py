"""What a client tells the router about a request: to which session it belongs, and which workers' labels it prefers or requires.

    session    header x-polyphase-session, else `prompt_cache_key`, else `user`
    labels     headers x-polyphase-prefer and x-polyphase-require, such as `zone=eu-1, rack=7`

`prompt_cache_key` is OpenAI's word for requests that share a prefix, and took the place of `user`, which meant the same. Their
`safety_identifier` says who is responsible, not what belongs together, and is left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

import xxhash
from starlette.types import Scope

from polyphase.core.errors import InvalidRequest
from polyphase.frontend.bodies import header
from polyphase.router.types import NO_LABELS, Labels

MAX_LABELS = 16
_LABEL = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._/-]{0,62})\s*=\s*([A-Za-z0-9._/-]{1,63})\s*")


class SessionFields(Protocol):
    """Of a request's body."""

    @property
    def prompt_cache_key(self) -> str | None: ...

    @property
    def user(self) -> str | None: ...

    @property
    def cache_salt(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class RoutingHints:
    """`session`: a hash, so that memory is bounded and no client's names are kept."""

    session: int | None = None
    preferred_labels: Labels = field(default_factory=lambda: NO_LABELS)
    required_labels: Labels = field(default_factory=lambda: NO_LABELS)

    @classmethod
    def of(cls, scope: Scope, request: SessionFields) -> RoutingHints:
        """Raises: InvalidRequest if a header has not the form that it should have."""
        name = header(scope, b"x-polyphase-session") or request.prompt_cache_key or request.user
        return cls(
            session=_session(name, request.cache_salt) if name else None,
            preferred_labels=_labels(scope, "x-polyphase-prefer"),
            required_labels=_labels(scope, "x-polyphase-require"),
        )


NO_HINTS = RoutingHints()


def _session(name: str, salt: str | None) -> int:
    """Of two tenants, the same name means two sessions."""
    text = name if salt is None else f"{salt}\0{name}"
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _labels(scope: Scope, name: str) -> Labels:
    text = header(scope, name.encode())
    if text is None:
        return NO_LABELS
    found = [_LABEL.fullmatch(pair) for pair in text.split(",")]
    labels = {match[1]: match[2] for match in found if match is not None}
    if len(labels) != len(found) or len(labels) > MAX_LABELS:
        raise InvalidRequest(
            f"the header {name} is {text[:100]!r}; write up to {MAX_LABELS} labels, each once, for example zone=eu-1,rack=7", param=name
        )
    return labels
