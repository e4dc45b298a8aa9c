"""Blocks that were damaged on their way over TCP are never good: through a relay that flips bits, cuts streams, and swaps what passes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest

from polyphase.core.errors import PolyphaseError
from polyphase.testing.relay import Recorder, Relay, Tamper, cut_at, flip_at, swap_at, untouched
from polyphase.testing.transfer import Side, ThreadWorld
from polyphase.transfer import Outcome, Verdict
from polyphase.transfer.backends import tcp
from polyphase.transfer.backends.tcp import TcpBackend
from polyphase.wire.transfer import frame_length

COUNT = 8
WIDTH = 4096
DATA_CONNECTION = 2  # after those for control and notifications
TIMEOUT_S = 2.0  # a damaged length has the reader wait for what never comes


class Pair:
    """A reader that reaches the owner through a relay only."""

    def __init__(self, world: ThreadWorld) -> None:
        self.owner, self.reader = Side(world, "owner"), Side(world, "reader")
        self.sources, self.targets = list(range(10, 10 + COUNT)), list(range(COUNT))

    def move(self, there: Tamper, back: Tamper, *, is_read: bool) -> Outcome:
        """With these on the connection that carries blocks."""
        region = self.owner.region
        card = self.owner.agent.card
        with Relay(card.tcp_address, lambda number: (there, back) if number == DATA_CONNECTION else (untouched, untouched)) as relay:
            card = msgspec.structs.replace(card, tcp_address=relay.address)
            with self.reader.agent.connect(card) as session:
                remote = session.blocks(region.region_id, self.sources, region.generations(self.sources))
                local = self.reader.region.blocks(self.targets)
                post = session.read(remote, local, TIMEOUT_S) if is_read else session.write(local, remote, TIMEOUT_S)
                return post.wait()

    def check(self, outcome: Outcome, *, is_read: bool) -> None:
        """What is said to be good is, and no block has changed that was not asked for."""
        for place, verdict in enumerate(outcome.verdicts):
            source, target = self.sources[place], self.targets[place]
            if verdict == Verdict.DONE and is_read:
                assert self.reader.get(target) == self.owner.content(source)
            elif verdict == Verdict.DONE:
                assert self.owner.get(source) == self.reader.content(target)
        side, asked = (self.reader, self.targets) if is_read else (self.owner, self.sources)
        assert all(side.get(block_id) == side.content(block_id) for block_id in range(64) if block_id not in asked)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ThreadWorld(lambda: [TcpBackend()], host=lambda name: name, tcp_address="127.0.0.1:0") as world:
        yield Pair(world)


def record(pair: Pair, *, is_read: bool) -> tuple[bytes, bytes]:
    """Both directions of an undisturbed transfer."""
    there, back = Recorder(), Recorder()
    outcome = pair.move(there, back, is_read=is_read)
    assert outcome.is_done
    return there.data, back.data


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("direction", ["there", "back"])
def test_no_flipped_bit_goes_unnoticed(pair: Pair, direction: str, is_read: bool) -> None:
    there, back = record(pair, is_read=is_read)
    stream = there if direction == "there" else back
    rng = random.Random(f"{direction}{is_read}")
    small = len(stream) < COUNT * WIDTH
    for position in sorted(rng.sample(range(len(stream)), 12 if small else 25)):
        tamper = flip_at(position, rng.randrange(8))
        outcome = pair.move(*((tamper, untouched) if direction == "there" else (untouched, tamper)), is_read=is_read)
        assert not outcome.is_done, (position, len(stream))
        pair.check(outcome, is_read=is_read)


def test_a_flipped_bit_in_a_block_spoils_that_block_only(pair: Pair) -> None:
    _, back = record(pair, is_read=True)
    position = back.index(pair.owner.content(13)) + 100
    outcome = pair.move(untouched, flip_at(position), is_read=True)
    assert list(outcome.verdicts) == [Verdict.CORRUPT if place == 3 else Verdict.DONE for place in range(COUNT)]
    pair.check(outcome, is_read=True)


@pytest.mark.parametrize("is_read", [True, False])
def test_a_stream_that_is_cut_short(pair: Pair, is_read: bool) -> None:
    there, back = record(pair, is_read=is_read)
    stream = back if is_read else there
    for position in random.Random(1).sample(range(len(stream)), 6):
        tamper = cut_at(position)
        outcome = pair.move(*((untouched, tamper) if is_read else (tamper, untouched)), is_read=is_read)
        assert not outcome.is_done
        pair.check(outcome, is_read=is_read)


def test_blocks_in_each_others_place(pair: Pair) -> None:
    _, back = record(pair, is_read=True)
    outcome = pair.move(untouched, swap_at(back.index(pair.owner.content(12)), WIDTH), is_read=True)
    assert outcome.failed_places() == [2, 3]
    assert {outcome.verdicts[2], outcome.verdicts[3]} == {Verdict.CORRUPT}
    pair.check(outcome, is_read=True)


def test_answers_to_two_requests_in_each_others_place(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is whole and right, but says so of other blocks than those that are waited for."""
    monkeypatch.setattr(tcp, "REQUEST_BYTES", COUNT // 2 * WIDTH)
    _, back = record(pair, is_read=True)
    verdicts_end = back.index(pair.owner.content(10))
    second = back.index(pair.owner.content(14))
    width = second - verdicts_end
    start = _greeting_bytes(back)
    assert len(back) == start + 2 * width
    outcome = pair.move(untouched, swap_at(start, width), is_read=True)
    assert Verdict.DONE not in outcome.verdicts
    pair.check(outcome, is_read=True)


def _greeting_bytes(stream: bytes) -> int:
    """The challenge and the welcome."""
    end = 0
    for _ in range(2):
        end += 4 + frame_length(stream[end : end + 4])
    return end


def test_a_session_through_a_damaged_control_connection_fails(pair: Pair) -> None:
    card = pair.owner.agent.card
    with Relay(card.tcp_address, lambda _: (flip_at(30), untouched)) as relay, pytest.raises(PolyphaseError):
        pair.reader.agent.connect(msgspec.structs.replace(card, tcp_address=relay.address), TIMEOUT_S)
