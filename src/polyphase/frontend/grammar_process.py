"""A process beside the frontend that prepares grammars which nobody knows yet, because it may be killed: `grammar_checks` is its owner.

    stdin   a frame for each message: Vocabulary, or Check        frame: length (4 bytes, little-endian), msgpack
    stdout  a frame for each: Verdict

It has so much CPU time for each check, so much memory, and dies of what goes beyond. It ends when its input does.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from typing import IO

import msgspec

from polyphase.core.errors import ConfigurationError, InvalidRequest
from polyphase.text import GrammarMatcher, GrammarVocabulary, Tokenizer
from polyphase.wire.requests import Grammar

MEMORY_LIMIT_BYTES = 4 << 30  # of address space
_WALK_TOKENS = 16
_LENGTH = struct.Struct("<I")


class Vocabulary(msgspec.Struct, frozen=True, tag="vocabulary"):
    """Of a model, for checks that name it later."""

    key: str
    tokenizer_json: bytes
    vocab_size: int
    eos_token_ids: list[int]


class Check(msgspec.Struct, frozen=True, tag="check"):
    key: str
    grammar: Grammar
    cpu_limit_s: float


class Verdict(msgspec.Struct, frozen=True):
    error: str | None  # None: it can be followed


_MESSAGES = msgspec.msgpack.Decoder(Vocabulary | Check)


def write_frame(stream: IO[bytes], message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None: it has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def check(vocabulary: GrammarVocabulary, grammar: Grammar) -> str | None:
    """What is wrong with it, if anything. Also walks a little way, since the first steps are where a grammar is dearest."""
    try:
        matcher = vocabulary.start(grammar)
    except InvalidRequest as error:
        return error.message
    _walk(matcher)
    return matcher.failure


def _walk(matcher: GrammarMatcher) -> None:
    for _ in range(_WALK_TOKENS):
        allowed = matcher.allowed()
        first = next((token_id for token_id, is_allowed in enumerate(allowed) if is_allowed), None)
        if first is None or not matcher.accept([first]) or matcher.is_complete:
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the end of the input is our signal
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    vocabularies: dict[str, GrammarVocabulary] = {}
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (data := read_frame(source)) is not None:
        match _MESSAGES.decode(data):
            case Vocabulary(key, tokenizer_json, vocab_size, eos_token_ids):
                try:
                    vocabularies[key] = GrammarVocabulary(Tokenizer.from_json(tokenizer_json), vocab_size, eos_token_ids)
                    verdict = Verdict(None)
                except ConfigurationError as error:
                    verdict = Verdict(error.message)
            case Check(key, grammar, cpu_limit_s):
                signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # its signal ends the process
                verdict = Verdict(check(vocabularies[key], grammar))
                signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sink, verdict)


if __name__ == "__main__":
    main()
