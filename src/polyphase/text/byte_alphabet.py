"""The alphabet in which byte-level BPE writes bytes as printable characters, and the form in which SentencePiece writes single ones."""

from __future__ import annotations

import re
from typing import Final


def _alphabet() -> dict[str, int]:
    """Printable Latin-1 bytes stand for themselves; the other 68 are moved to U+0100 and up, in order.

    Source: GPT-2's `bytes_to_unicode`, which every byte-level tokenizer follows.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + offset): byte for offset, byte in enumerate(moved)})
    return alphabet


CHAR_TO_BYTE: Final = _alphabet()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_piece(piece: str) -> bytes:
    """Bytes that a piece of a byte-level vocabulary stands for; an added token with other characters stands for its own text."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in piece])
    except KeyError:
        return piece.encode()


def byte_of_fallback_piece(piece: str) -> int | None:
    """The byte that `<0xE2>` stands for; None for any other piece."""
    found = _BYTE_PIECE.fullmatch(piece)
    return int(found[1], 16) if found else None
