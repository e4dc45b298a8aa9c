"""Text of a growing sequence of tokens, handed out as soon as it is final.

Decoding token by token goes wrong in two ways: a character may be spread over several tokens, and a piece may look different at the
start of a text (SentencePiece drops its leading space there). Decoding everything anew for each token is right and quadratic. Two ways
round that are here: where each piece stands for bytes, the bytes go through an incremental UTF-8 decoder; elsewhere a short window of the
latest pieces is decoded with and without the new ones, and the difference is new text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from polyphase.text.tokenizer import PieceForm, Tokenizer

CONTEXT_TOKEN_COUNT = 8  # enough for a whole character and the token before it
_WINDOW_KEEP = 4
_WINDOW_LIMIT = 16  # decoding a token costs as much as a window of 4 to 16 pieces
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Feeds on tokens, gives text that will not change any more.

        context_ids | pushed ids
        already out | push() … push() flush()     together: what decode() makes of the pushed ids after that context

    At most the bytes of one unfinished character are held back, and only as long as they can still become one. Invalid bytes come
    out as U+FFFD. (In a run of SentencePiece byte pieces that is not UTF-8, `decode` replaces every byte of the run, this only
    the invalid ones: the rest is out already.)

    Cost: O(1) for each token; about 0.3 µs with a byte-level tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        context = context_ids[-CONTEXT_TOKEN_COUNT:]
        self._stream: _ByteStream | _TokenWindow
        if tokenizer.form is PieceForm.BYTE_LEVEL:
            self._stream = _ByteStream(tokenizer, context, skip_special_tokens)
        else:
            self._stream = _TokenWindow(tokenizer, context, skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens make final."""
        return self._stream.push(token_ids)

    def flush(self) -> str:
        """What was held back, at the end of the sequence: an unfinished character as U+FFFD, or nothing."""
        return self._stream.flush()


class _ByteStream:
    """For byte-level vocabularies."""

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = _Utf8Decoder("replace")
        self.push(context_ids)  # so that a character begun in the context can be finished

    def push(self, token_ids: Sequence[int]) -> str:
        tokenizer = self._tokenizer
        skips = self._skip_special_tokens
        data = b"".join([tokenizer.token_bytes(i) or b"" for i in token_ids if not (skips and tokenizer.is_special(i))])
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TokenWindow:
    """For vocabularies of text pieces.

        _window:  | piece  piece  piece  piece | new pieces |
                    text already handed out      text[_window_length:] is new

    Pieces that stand for nothing are left out of the window, so that its first piece is always one that text follows.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = _Utf8Decoder("replace")  # for `<0x..>` pieces
        self._window = self._visible(context_ids)
        self._window_length = len(self._decode(self._window))  # characters
        self._has_open_bytes = False

    def push(self, token_ids: Sequence[int]) -> str:
        texts: list[str] = []
        pieces: list[int] = []
        for token_id in self._visible(token_ids):
            byte = self._tokenizer.fallback_byte(token_id)
            if byte is None:
                if self._has_open_bytes:
                    texts.append(self._close_bytes())
                pieces.append(token_id)
                continue
            texts.append(self._push_pieces(pieces))
            pieces = []
            texts.append(self._bytes.decode(bytes([byte])))
            self._has_open_bytes = True
            self._slide([token_id])
        texts.append(self._push_pieces(pieces))
        return "".join(texts)

    def flush(self) -> str:
        held = self._close_bytes()
        text = self._decode(self._window)
        rest, self._window_length = text[self._window_length :], len(text)
        return held + rest

    def _push_pieces(self, pieces: list[int]) -> str:
        if not pieces:
            return ""
        text = self._decode(self._window + pieces)
        # Some decoder of an unknown kind may still make a character of the last U+FFFD; one token later it cannot matter.
        is_open = text.endswith(_REPLACEMENT) and len(self._window) < _WINDOW_LIMIT
        final_length = len(text) - 1 if is_open else len(text)
        new = text[self._window_length : final_length]
        if is_open:
            self._window += pieces
            self._window_length = max(self._window_length, final_length)
        else:
            self._slide(pieces, len(text))
        return new

    def _slide(self, pieces: list[int], window_length: int | None = None) -> None:
        """Take `pieces`, whose text is out, into the window; drop its oldest ones when it has grown long."""
        self._window += pieces
        if len(self._window) > _WINDOW_LIMIT:
            del self._window[:-_WINDOW_KEEP]
            window_length = None
        self._window_length = len(self._decode(self._window)) if window_length is None else window_length

    def _close_bytes(self) -> str:
        self._has_open_bytes = False
        return self._bytes.decode(b"", final=True)

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        tokenizer = self._tokenizer
        skips = self._skip_special_tokens
        return [i for i in token_ids if tokenizer.token_bytes(i) is not None and not (skips and tokenizer.is_special(i))]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
