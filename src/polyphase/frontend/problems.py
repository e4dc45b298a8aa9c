"""Errors as answers: OpenAI's error object, the status, and the headers that belong to it."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Send

from polyphase.core.errors import BodyTooLarge, Evicted, PolyphaseError, Refused
from polyphase.frontend.answers import DONE, encode
from polyphase.frontend.bodies import discard_body


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


async def refuse_body(error: BodyTooLarge, receive: Receive, send: Send) -> None:
    """Answer, and take in the rest of the body for a moment."""
    body = encode(error_object(error))
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    await send(start_message(error.http_status, headers))
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await discard_body(receive)
    await send({"type": "http.response.body", "body": b""})
