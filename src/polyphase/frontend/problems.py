"""Errors as answers: OpenAI's error object, the status, and the headers that belong to it."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Message

from polyphase.core.errors import Evicted, PolyphaseError, Refused
from polyphase.frontend.answers import DONE, encode


class InternalError(PolyphaseError):
    """A bug of ours. What went wrong is in the log, not in the answer."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error; the log has more about request {request_id}", request_id=request_id)


def error_object(error: PolyphaseError) -> dict[str, Any]:
    param = getattr(error, "param", None)
    return {"error": {"message": error.message, "type": error.error_type, "param": param, "code": error.code}}


def error_headers(error: PolyphaseError) -> dict[str, str]:
    return {"retry-after": str(error.retry_after_s)} if isinstance(error, Refused | Evicted) else {}


def error_response(error: PolyphaseError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        encode(error_object(error)), error.http_status, {**error_headers(error), **(headers or {})}, media_type="application/json"
    )


def error_events(error: PolyphaseError) -> bytes:
    """The end of a stream that broke off."""
    return b"data: " + encode(error_object(error)) + b"\n\n" + DONE


def start_message(status: int, headers: dict[str, str]) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
