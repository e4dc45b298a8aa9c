"""How a server is reached and what it is told of us: its address, the key that it wants, and what it calls the model."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from polyphase.core.errors import ConfigurationError
from polyphase.wire.cards import RequestKind

HIDDEN = "[api key]"


class ApiKey:
    """A secret that shows nowhere: not in logs, messages or tracebacks, and `hide` takes it out of what a server says."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        """Raises: ConfigurationError for what no header can carry; the message does not show it."""
        text = text.strip()
        if not text or not text.isascii() or not text.isprintable():
            raise ConfigurationError("the engine's API key is empty or holds characters that a header cannot carry")
        self._text = text

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._text}"}

    def hide(self, said: str) -> str:
        return said.replace(self._text, HIDDEN)


@dataclass(frozen=True, slots=True)
class Passes:
    """What a server takes as bodies: the path of each kind (media have that of the conversation), and its name of the model."""

    upstream_name: str
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        return sorted(self.paths)

    def path_of(self, kind: str) -> str:
        return self.paths[kind]


@dataclass(frozen=True, slots=True)
class Access:
    key: ApiKey | None = None
    uses_proxies: bool = False  # those of the environment; they know nothing of this machine's loopback

    def headers(self) -> dict[str, str]:
        return self.key.headers() if self.key is not None else {}

    def hide(self, said: str) -> str:
        return self.key.hide(said) if self.key is not None else said

    @classmethod
    def to(cls, url: str, key: ApiKey | None) -> Access:
        return cls(key, uses_proxies=not is_loopback(url))


def checked_base(text: str) -> str:
    """The address of a server without `/v1` and slashes at its end. Raises: ConfigurationError, without what may be a secret in it."""
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError("--attach: an address holds no user, password, query or fragment; for a key there is --engine-api-key-env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"--attach {text} is no address of a server; write for example http://127.0.0.1:8080")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
USUAL_PATHS: dict[str, tuple[str, ...]] = {
    RequestKind.CHAT: (CHAT_PATH,),
    RequestKind.COMPLETIONS: (COMPLETIONS_PATH,),
    RequestKind.EMBEDDINGS: ("/v1/embeddings",),
    RequestKind.RERANK: ("/v1/rerank", "/rerank"),
    RequestKind.SCORE: ("/v1/score", "/score"),
    RequestKind.CLASSIFY: ("/classify", "/v1/classify"),
    RequestKind.TRANSCRIPTIONS: ("/v1/audio/transcriptions",),
    RequestKind.TRANSLATIONS: ("/v1/audio/translations",),
    RequestKind.SPEECH: ("/v1/audio/speech",),
}
