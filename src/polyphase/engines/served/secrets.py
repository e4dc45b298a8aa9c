"""The API key of an engine's server: from the environment, since a command line can be read by everybody on the machine."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "POLYPHASE_ENGINE_API_KEY"


def api_key_of(environment: Mapping[str, str]) -> str | None:
    return environment.get(VARIABLE) or None


def headers_of(api_key: str | None) -> dict[str, str]:
    """With which it is sent."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}
