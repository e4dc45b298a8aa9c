"""Bodies and answers keep every byte but the model's name, wherever a stream is cut; and windows are kept."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import InvalidRequest, WireError
from polyphase.engines.served.passages import Passage, message_of
from polyphase.engines.served.rewriting import AnswerModel, EventRewriter, usage_in, with_model
from polyphase.engines.served.sse import MAX_EVENT_BYTES
from polyphase.wire.requests import FinishReason, Forward, PassedUsage

STREAM = (
    b": a comment\n\nevent: delta\nid: 7\ndata: "
    + b'{"id":"1","model":"up/stream","choices":[{"delta":{"content":"model \\"up/stream\\" \xc3\xa9"},"finish_reason":null}]}\n\n'
    + b'data: {"model":"other","x":1.50}\r\n\r\ndata:{"model":"up/stream","choices":[{"finish_reason":"stop"}]}\n\n'
    + b'data: {"model":"up/stream","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,'
    + b'"prompt_tokens_details":{"cached_tokens":3}}}\n\n'
    + b"data: [DONE]\n\n"
)
RENAMED = STREAM.replace(b'"model":"up/stream"', b'"model":"x"').replace(b'data:{"model":"x"', b'data: {"model":"x"')


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_keeps_all_but_the_name(cuts: list[int]) -> None:
    rewriter = EventRewriter(AnswerModel("x", "up/stream"))
    places = sorted({0, *cuts, len(STREAM)})
    told = b"".join(rewriter.push(STREAM[start:end]) for start, end in pairwise(places)) + rewriter.rest()
    assert told == RENAMED
    assert rewriter.has_ended
    assert rewriter.usage == PassedUsage(7, 2, 3)


def test_with_the_same_name_nothing_changes() -> None:
    rewriter = EventRewriter(AnswerModel("up/stream", "up/stream"))
    assert rewriter.push(STREAM) + rewriter.rest() == STREAM


def test_an_endless_line_is_not_kept() -> None:
    rewriter = EventRewriter(AnswerModel("x", "y"))
    for _ in range(8):
        rewriter.push(b"x" * (MAX_EVENT_BYTES // 8))
    with pytest.raises(WireError):
        rewriter.push(b"x")


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none())))
def test_a_body_keeps_all_but_the_name(fields: dict[str, object]) -> None:
    fields = {name: value for name, value in fields.items() if name.isprintable()}
    told = json.loads(with_model(json.dumps({**fields, "model": "x"}).encode(), "up", None))
    assert told == {**fields, "model": "up"}


def test_bodies_that_are_none() -> None:
    for body in (b"[]", b"", b'{"a":'):
        with pytest.raises(InvalidRequest):
            with_model(body, "up", None)
    assert with_model(b"..name..", "other", (2, 6)) == b"..other.."


def test_usage_of_odd_answers() -> None:
    for data in (b"", b'{"usage": null}', b'{"usage": 3}', b'{"usage"', b'{"text": "\\"usage\\""}'):
        assert usage_in(data) is None
    assert usage_in(b'{"usage": {"prompt_tokens": 4, "total_tokens": 4}}') == PassedUsage(4, 0, 0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "m", "type": "t"}}', "m"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": [{"loc": ["body"], "msg": "odd"}]}', '[{"loc":["body"],"msg":"odd"}]'),
        (b'{"object": "error", "message": "vllm of old"}', "vllm of old"),
        (b"<html>", "<html>"),
        (b"\xff", "\ufffd"),
    ],
)
def test_messages_of_errors(body: bytes, said: str) -> None:
    assert message_of(body) == said


def test_the_end_comes_once_and_with_what_is_left() -> None:
    told = {"model": "x", "wants_stream": True, "window": 10, "prompt_token_count": 1}
    forward = Forward(request_id="a", kinds=["chat"], body=b"", content_type="", **told)  # type: ignore[arg-type]
    passage = Passage(forward)
    passage.status, passage.content_type = 200, "text/plain"
    passage.pending += b"abc"
    first = passage.take_output()
    assert first.passed is not None
    assert (first.passed.status, first.passed.data, first.finish_reason) == (200, b"abc", None)
    passage.pending += b"d"
    passage.usage = PassedUsage(1, 2, 0)
    passage.end(FinishReason.STOP)
    passage.end(FinishReason.CANCELLED)
    last = passage.take_output()
    assert last.passed is not None
    assert (last.passed.status, last.passed.data, last.passed.usage, last.finish_reason) == (
        0,
        b"d",
        PassedUsage(1, 2, 0),
        FinishReason.STOP,
    )
