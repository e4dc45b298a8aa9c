"""Structured output: which tokens may come next, so that the text becomes a sentence of a grammar.

    tokenizer, EOS ids ─► GrammarVocabulary ── start(grammar) ─► GrammarMatcher ── allowed · accept · allowed · accept … is_complete

The grammars themselves (JSON schemas, regular expressions, choices, Lark and GBNF) are understood by the `llguidance` library; the frontend
checks with the same code with which engines follow the output, so what is accepted at the door can be followed behind it.

A small grammar may take minutes to prepare (intersections and complements of regular expressions, `multipleOf` a large number), and the
library's own limits do not prevent it. So only `frontend.grammar_checks` prepares what nobody has prepared before, in a process that may be
killed; engines get what passed there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance

from polyphase.core.errors import ConfigurationError, InvalidRequest
from polyphase.text.tokenizer import Tokenizer
from polyphase.wire.requests import Grammar, GrammarKind

_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_MAX_ERROR_CHARS = 500
_MARK = "\x02"  # no vocabulary merges it with anything
# Between the parts of JSON: a space, or a new line and its indentation. Small models, left to themselves, go on with spaces for ever.
_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,32}"
_WILD_WHITESPACE = r"[\x20\n\r\t]+"
_ANY_OBJECT = '{"type":"object"}'


class _Pieces:
    """A vocabulary in the form that the library asks for: bytes of each id, which of them are no text, and how a model would write a text.

    The last is asked where only one text can come next, and must give that text to the byte: tokenizers that put a space in front of what
    they are given do so only at the beginning, so there they are given a mark, which is taken away again.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        eos = set(eos_token_ids)
        known = [None if tokenizer.is_special(i) or i in eos else tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.tokens = [b"<|%d|>" % i if piece is None else piece for i, piece in enumerate(known)]
        self.special_token_ids = [i for i, piece in enumerate(known) if piece is None]
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self._tokenizer = tokenizer
        self._mark_ids = tokenizer.encode(_MARK)
        self._by_bytes = {piece: i for i, piece in enumerate(known) if piece}
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(_MARK + text)
        mark_count = len(self._mark_ids)
        wanted = text.encode()
        if ids[:mark_count] == self._mark_ids and b"".join(self.tokens[i] for i in ids[mark_count:]) == wanted:
            return ids[mark_count:]
        return self._longest_first(wanted)

    def _longest_first(self, wanted: bytes) -> list[int]:
        """Not as the model would write it, but to the byte; as far as the vocabulary goes."""
        ids: list[int] = []
        place = 0
        while place < len(wanted):
            end = min(place + self._longest, len(wanted))
            while end > place and wanted[place:end] not in self._by_bytes:
                end -= 1
            if end == place:
                break
            ids.append(self._by_bytes[wanted[place:end]])
            place = end
        return ids


class GrammarVocabulary:
    """A tokenizer, as grammars need it. Safe to use from several threads; the interpreter's lock is free while a grammar is prepared."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Cost: 5 ms for each 1,000 ids. Raises: ConfigurationError if the library takes no such vocabulary, or nothing ends an output."""
        if not eos_token_ids:
            raise ConfigurationError("the model has no end-of-sequence token, so an output could not end where its grammar lets it")
        try:
            pieces = llguidance.TokenizerWrapper(_Pieces(tokenizer, vocab_size, eos_token_ids))
            self._tokens = llguidance.LLTokenizer(pieces, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except Exception as error:  # the library raises nothing more exact
            raise ConfigurationError(f"the tokenizer cannot be used for structured output: {_short(str(error))}") from error

    def start(self, grammar: Grammar, *, any_whitespace: bool = False) -> GrammarMatcher:
        """A matcher at the beginning of a sentence; with `any_whitespace`, between the parts of JSON, however much.

        Raises: InvalidRequest with the library's reason, if it is no grammar, none that anything fits, or one that is not supported.
        Cost: usually around 1 ms; see the top of the module.
        """
        matcher = llguidance.LLMatcher(
            self._tokens, _source(grammar, _WILD_WHITESPACE if any_whitespace else _WHITESPACE), log_level=0, limits=_LIMITS
        )
        if matcher.is_error():
            raise InvalidRequest(_short(matcher.get_error()))
        return GrammarMatcher(matcher)


class GrammarMatcher:
    """Follows one output. One thread at a time.

    A matcher can get stuck, on a token that does not fit or a state that is too complex; then `failure` says why, and it stays so.
    """

    __slots__ = ("_inner",)

    def __init__(self, inner: llguidance.LLMatcher) -> None:
        self._inner = inner

    def copy(self) -> GrammarMatcher:
        """At the same place of another output. Cost: about 10 µs."""
        return GrammarMatcher(self._inner.deep_copy())

    def allowed(self) -> bytes:
        """A byte for each id of the vocabulary, 0 where the token must not come next. EOS may come where the sentence may end.

        Cost: 10 to 100 µs, at first more; the interpreter's lock is free meanwhile.
        """
        return self._inner.compute_logit_bias()

    def accept(self, token_ids: Sequence[int]) -> bool:
        """The output goes on with these. False: they do not fit, or it was stuck already."""
        return self._inner.consume_tokens(list(token_ids))

    @property
    def is_complete(self) -> bool:
        """The sentence is whole, and nothing may follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    @property
    def failure(self) -> str | None:
        return _short(self._inner.get_error()) if self._inner.is_error() else None


def _source(grammar: Grammar, whitespace: str) -> str:
    """In the library's own form. Raises: InvalidRequest."""
    text = grammar.text
    try:
        match grammar.kind:
            case GrammarKind.JSON:
                return _of_schema(_ANY_OBJECT, whitespace)
            case GrammarKind.JSON_SCHEMA:
                return _of_schema(text, whitespace)
            case GrammarKind.REGEX:
                return llguidance.LLMatcher.grammar_from_regex(text)
            case GrammarKind.CHOICE:
                literals = [json.dumps(one, ensure_ascii=False) for one in json.loads(text)]
                return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(literals))
            case GrammarKind.EBNF:
                return llguidance.grammar_from("grammar", text)
    except ValueError as error:
        raise InvalidRequest(_short(str(error))) from error


def _of_schema(text: str, whitespace: str) -> str:
    """The library takes `true` for no schema by itself."""
    schema = "{}" if text == "true" else text
    if schema == "false":
        raise InvalidRequest("Unsatisfiable schema: nothing fits `false`")
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": whitespace})


def _short(message: str) -> str:
    """Without the picture of the library's state, and on one line."""
    lines = [line.strip() for line in message.partition("<state>")[0].replace("<non-verbose/>", "").splitlines()]
    found = " ".join(line for line in lines if line)
    return found if len(found) <= _MAX_ERROR_CHARS else found[:_MAX_ERROR_CHARS] + " …"
