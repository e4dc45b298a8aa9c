"""The smallest requests of each kind, by which a server shows what it takes."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from typing import Any

from polyphase.wire.cards import RequestKind

SIDE = 32  # pixels: smaller images than a patch are refused by some models
SOUND_S = 0.5


def bodies(model: str) -> dict[str, dict[str, Any]]:
    """By kind; those of forms are in `form`."""
    text = [{"role": "user", "content": "Hi"}]
    return {
        RequestKind.CHAT: {"model": model, "messages": text, "max_tokens": 1},
        RequestKind.COMPLETIONS: {"model": model, "prompt": "Hi", "max_tokens": 1},
        RequestKind.EMBEDDINGS: {"model": model, "input": "Hi"},
        RequestKind.RERANK: {"model": model, "query": "Hi", "documents": ["Hi"]},
        RequestKind.SCORE: {"model": model, "text_1": "Hi", "text_2": "Hi"},
        RequestKind.CLASSIFY: {"model": model, "input": "Hi"},
        RequestKind.SPEECH: {"model": model, "input": "Hi", "voice": "alloy"},
    }


def media_bodies(model: str) -> dict[str, dict[str, Any]]:
    """The conversation of `bodies` with something besides its text."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(png())}"}}
    sound = {"type": "input_audio", "input_audio": {"data": _base64(wav()), "format": "wav"}}
    hello = {"type": "text", "text": "Hi"}
    return {
        kind: {"model": model, "messages": [{"role": "user", "content": [hello, part]}], "max_tokens": 1}
        for kind, part in ((RequestKind.IMAGES, image), (RequestKind.AUDIO, sound))
    }


def form(model: str) -> dict[str, Any]:
    """Arguments for httpx: a sound to be written down."""
    return {"data": {"model": model}, "files": {"file": ("silence.wav", wav(), "audio/wav")}}


def png() -> bytes:
    """A grey square."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\0" + b"\x80\x80\x80" * SIDE) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav() -> bytes:
    """Silence."""
    rate = 16_000
    whole = io.BytesIO()
    with wave.open(whole, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(int(2 * rate * SOUND_S)))
    return whole.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
