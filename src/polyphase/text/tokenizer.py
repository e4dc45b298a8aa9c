"""A model's tokenizer, made from the `tokenizers` file in its card: text to ids, ids to text, and what one id stands for."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import tokenizers

from polyphase.core.errors import ConfigurationError
from polyphase.text.byte_alphabet import byte_of_fallback_piece, bytes_of_piece

MAX_TOKEN_ID = 2**32 - 1  # what the library can take at all


class PieceForm(enum.Enum):
    """How the decoder turns pieces into text, which decides how it can be done piece by piece."""

    BYTE_LEVEL = "byte-level"  # each piece stands for bytes, whatever is around it
    BYTE_FALLBACK = "byte-fallback"  # pieces are text, but for `<0x..>` ones, which are single bytes
    TEXT = "text"  # pieces are text


class _DecoderOfFile(msgspec.Struct):
    """The one part of the file that is looked at here; a large vocabulary is not made into Python objects for it."""

    decoder: dict[str, Any] | None = None


class Tokenizer:
    """Over the `tokenizers` library. Safe to use from several threads at once.

    The file's own truncation and padding are switched off: a prompt is never cut silently.
    """

    def __init__(self, inner: tokenizers.Tokenizer, form: PieceForm) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.form = form
        self._special_ids = frozenset(token_id for token_id, token in inner.get_added_tokens_decoder().items() if token.special)
        self._longest_piece = max(map(len, inner.get_vocab(with_added_tokens=True)), default=1)  # characters
        self._bytes: dict[int, bytes | None] = {}  # filled on first use; at most one entry for each id of the vocabulary

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """Raises: ConfigurationError if `data` is not a tokenizer file of the `tokenizers` library."""
        try:
            text = data.decode()
            inner = tokenizers.Tokenizer.from_str(text)
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"tokenizer.json is not UTF-8: {error}") from error
        except Exception as error:  # the library raises nothing more exact
            raise ConfigurationError(f"tokenizer.json cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
        return cls(inner, _piece_form(msgspec.json.decode(data, type=_DecoderOfFile).decoder))

    def to_json(self) -> bytes:
        """The file that it was made from, but for what was switched off. Cost: some 100 ms for 150,000 tokens."""
        text: str = self._inner.to_str()
        return text.encode()

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added ones included. A model's output layer may have more rows."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Cost: about 1 s for each 1-5 million characters; releases the interpreter's lock meanwhile."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def least_token_count(self, text: str) -> int:
        """How many tokens `text` has at the very least; known without tokenising it."""
        return math.ceil(len(text) / max(self._longest_piece, 1))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. Ids that the tokenizer does not know stand for nothing."""
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, piece: str) -> int | None:
        found: int | None = self._inner.token_to_id(piece)
        return found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes | None:
        """Bytes that this id alone stands for, leading space included; None for an id without a piece.

        A character may be spread over several tokens, so these need not be UTF-8.
        """
        try:
            return self._bytes[token_id]
        except KeyError:
            pass
        if not 0 <= token_id <= MAX_TOKEN_ID:
            return None
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return None
        found = self._bytes[token_id] = self._piece_bytes(piece)
        return found

    def token_text(self, token_id: int) -> str:
        """What this id alone looks like, for log-probabilities; half a character shows as U+FFFD."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", "replace")

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte of a `<0x..>` piece where the tokenizer falls back on bytes; None for any other id."""
        if self.form is not PieceForm.BYTE_FALLBACK:
            return None
        piece = self._inner.id_to_token(token_id)
        return None if piece is None else byte_of_fallback_piece(piece)

    def _piece_bytes(self, piece: str) -> bytes:
        if self.form is PieceForm.BYTE_LEVEL:
            return bytes_of_piece(piece)
        if self.form is PieceForm.BYTE_FALLBACK and (byte := byte_of_fallback_piece(piece)) is not None:
            return bytes([byte])
        return piece.replace("▁", " ").encode()


def _piece_form(decoder: dict[str, Any] | None) -> PieceForm:
    if decoder is None:
        return PieceForm.TEXT
    if decoder.get("type") == "ByteLevel":
        return PieceForm.BYTE_LEVEL
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceForm.BYTE_LEVEL
    return PieceForm.BYTE_FALLBACK if "ByteFallback" in kinds else PieceForm.TEXT
