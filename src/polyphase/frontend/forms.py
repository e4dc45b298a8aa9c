"""Forms (multipart/form-data), as audio comes in: their text fields, and where the model's name stands, so that it can be put right.

The bytes are not changed here, nor copied: only names and short texts are read. Source: RFC 7578.
"""

from __future__ import annotations

import re
from email.message import Message

from polyphase.core.errors import InvalidRequest, UnsupportedMediaType
from polyphase.frontend.passing import Asked, asked_in

MAX_PARTS = 128
MAX_TEXT_BYTES = 64_000
_NAME = re.compile(rb'(?i)content-disposition:[^\r\n]*?;\s*name="?([^";\r\n]+)"?')
_FILE = re.compile(rb"(?i)content-disposition:[^\r\n]*?;\s*filename\*?=")


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def asked_in_form(body: bytes, content_type: str) -> Asked:
    """Raises: UnsupportedMediaType, InvalidRequest."""
    if not is_form(content_type):
        raise UnsupportedMediaType(f"the content type must be multipart/form-data, not {content_type[:100]!r}")
    fields: dict[str, str] = {}
    model_span: tuple[int, int] | None = None
    for head, start, end in _parts(body, _boundary(content_type)):
        name = _NAME.search(head)
        if name is None or _FILE.search(head) or end - start > MAX_TEXT_BYTES:
            continue
        field = name[1].decode("utf-8", "replace")
        fields[field] = body[start:end].decode("utf-8", "replace")
        if field == "model":
            model_span = (start, end)
    return asked_in(fields, model_span)


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary()
    if not boundary:
        raise InvalidRequest("the content type multipart/form-data names no boundary")
    return b"--" + boundary.encode("latin-1", "replace")


def _parts(body: bytes, delimiter: bytes) -> list[tuple[bytes, int, int]]:
    """Head, and where the content begins and ends, of each part."""
    found: list[tuple[bytes, int, int]] = []
    at = body.find(delimiter)
    if at > 0 and body[at - 2 : at] != b"\r\n":
        at = -1
    while at >= 0 and len(found) <= MAX_PARTS:
        line_end = body.find(b"\r\n", at)
        if line_end < 0 or body[at + len(delimiter) : at + len(delimiter) + 2] == b"--":
            return found
        head_end = body.find(b"\r\n\r\n", line_end)
        following = body.find(b"\r\n" + delimiter, head_end)
        if head_end < 0 or following < 0:
            break
        found.append((body[line_end:head_end], head_end + 4, following))
        at = following + 2
    raise InvalidRequest(f"the form is not whole, or has more than {MAX_PARTS} parts")
