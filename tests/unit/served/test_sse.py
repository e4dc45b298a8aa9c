"""Server-sent events, wherever the bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polyphase.engines.served.sse import EventSplitter

STREAM = b': hello\r\ndata: {"a":1}\r\n\r\nevent: x\ndata: two\ndata:lines\n\n\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(min_value=0, max_value=len(STREAM)), max_size=20))
def test_cuts_do_not_matter(cuts: list[int]) -> None:
    ends = sorted({*cuts, len(STREAM)})
    splitter, found, start = EventSplitter(), [], 0
    for end in ends:
        found += splitter.push(STREAM[start:end])
        start = end
    assert found == [b'{"a":1}', b"two\nlines", b"[DONE]"]
