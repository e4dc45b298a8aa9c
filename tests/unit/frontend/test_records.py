from __future__ import annotations

from polyphase.core.ids import RequestId
from polyphase.frontend.names import RequestNames
from polyphase.frontend.records import Records, RequestRecord, SequenceRecord


def record(name: str) -> RequestRecord:
    return RequestRecord(id=name, answer_id=f"cmpl-{name}", model="m", endpoint="completions", created_unix_s=0, prompt_tokens=3)


def test_the_ring_forgets_the_oldest_under_all_its_names() -> None:
    records = Records(2)
    for name in ("a", "b", "c"):
        records.add(RequestId(name), record(name))
    assert records.find("a") is None
    assert records.find("cmpl-a") is None
    assert [r.id for r in records.latest(10)] == ["c", "b"]
    assert records.find("cmpl-b") is records.find("b")


def test_of_two_with_one_name_the_later_is_found() -> None:
    records = Records(2)
    first, second, third = record("same"), record("same"), record("other")
    records.add(RequestId("same-1"), first)
    records.add(RequestId("same-2"), second)
    assert records.find("same") is second
    records.add(RequestId("other"), third)
    assert records.find("same") is second, "the first one's end must not take the second one's name"


def test_times_between_tokens() -> None:
    sequence = SequenceRecord(started_ns=0)
    assert sequence.note_tokens(1, 5_000_000) is None
    assert sequence.note_tokens(2, 9_000_000) == 2.0
    assert sequence.ttft_ms == 5.0
    whole = record("x")
    whole.sequences.append(sequence)
    page = whole.as_json()
    assert (page["completion_tokens"], page["ttft_ms"], page["itl_ms_mean"], page["itl_ms_p99"]) == (3, 5.0, 2.0, 2.0)


def test_names_of_requests() -> None:
    made = RequestNames.of(None)
    assert made.shown == made.internal
    assert made.answer_id("chatcmpl").startswith("chatcmpl-")
    given, again = RequestNames.of("mine"), RequestNames.of("mine")
    assert given.shown == again.shown == "mine"
    assert given.internal != again.internal
    for unusable in ("", "a b", "a\nb", "x" * 129):
        assert RequestNames.of(unusable).shown != unusable
