"""Server-sent events out of a stream of bytes, wherever it is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from polyphase.core.errors import WireError

MAX_EVENT_BYTES = 8 << 20
DONE = b"[DONE]"  # Source: OpenAI's streams end with it


class EventSplitter:
    """Feeds on bytes, gives the data of whole events. Lines end with LF or CRLF; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, received: bytes) -> Iterator[bytes]:
        """Raises: WireError for an event beyond `MAX_EVENT_BYTES`."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise WireError(f"the engine sent a line of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []


async def event_data(received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Until `[DONE]`, or the end of the stream. Raises: WireError."""
    splitter = EventSplitter()
    async for part in received:
        for data in splitter.push(part):
            if data == DONE:
                return
            yield data
