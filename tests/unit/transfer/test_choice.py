"""Which backend is chosen, and what is said of the others; agent cards as they travel."""

from __future__ import annotations

import msgspec
import pytest
from xxhash import xxh3_64_intdigest

from polyphase.core.errors import TransferRefused, WireError
from polyphase.transfer.choice import choose, choose_for_regions
from polyphase.transfer.doors import why_not_by_unix
from polyphase.wire.transfer import (
    AgentCard,
    BackendCard,
    Goodbye,
    RegionCard,
    Take,
    decode_card,
    decode_frame,
    encode_card,
    encode_frame,
    frame_length,
)


class Judge:
    def __init__(self, name: str, rank: float | None, reason: str = "so it is") -> None:
        self.name, self.rank, self.reason = name, rank, reason

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judge:
        return self


def card(*backends: str, **changes: object) -> AgentCard:
    made = AgentCard("a", 7, "host", 0, "/run/a", "10.0.0.1:5", True, [BackendCard(name) for name in backends])
    return msgspec.structs.replace(made, **changes)


def test_the_best_that_both_have() -> None:
    judges = [Judge("slow", 1), Judge("fast", 9), Judge("broken", None, "no cable"), Judge("ours", 50)]
    choice = choose(card(), card("slow", "fast", "broken", "theirs", "lost"), judges, {"lost": "not installed"})
    assert choice.possible == ["fast", "slow"]
    assert choice.explain().splitlines() == [
        "fast: chosen: so it is",
        "slow: possible: so it is",
        "broken: not possible: no cable",
        "ours: not possible: agent a does not have it",
        "lost: not possible: not installed",
        "theirs: not possible: this agent was made without it",
    ]
    choice.require("a")


def test_no_way_at_all() -> None:
    with pytest.raises(TransferRefused, match=r"agent b can both use \(x: no cable\)"):
        choose(card(), card("x"), [Judge("x", None, "no cable")], {}).require("b")
    with pytest.raises(TransferRefused, match="this one has none"):
        choose(card(), card(), [], {}).require("b")


def test_each_pair_of_memories_has_its_own_best() -> None:
    choice = choose(card(), card("fast", "slow"), [Judge("slow", 1), Judge("fast", 9)], {})
    assert choose_for_regions(choice, ["slow", "fast"], RegionCard("r", "host", 1, 1, ["fast", "slow"])) == "fast"
    assert choose_for_regions(choice, ["slow", "fast"], RegionCard("r", "host", 1, 1, ["slow"])) == "slow"
    with pytest.raises(TransferRefused, match=r"reached by fast\) and the peer's cuda memory \(reached by slow\); possible .*: fast, slow"):
        choose_for_regions(choice, ["fast"], RegionCard("r", "cuda", 1, 1, ["slow"]))


def test_who_is_in_reach_of_a_unix_socket(tmp_path: object) -> None:
    here = card(unix_path=str(tmp_path))
    assert why_not_by_unix(here, here) is None
    assert "another host" in str(why_not_by_unix(here, card(host_id="x")))
    assert "belongs to user 9" in str(why_not_by_unix(here, card(user_id=9)))
    assert "cannot be seen" in str(why_not_by_unix(here, card(unix_path="/nowhere")))


GOLDEN = bytes.fromhex(
    "8aa86167656e745f6964a161a565706f636807a7686f73745f6964a4686f7374a7757365725f696400a9756e69785f70617468a62f72756e2f61ab74"
    "63705f61646472657373aa31302e302e302e313a35a96861735f746f6b656ec3a86261636b656e64739182a46e616d65a373686da5666163747380a7"
    "726567696f6e739187a9726567696f6e5f6964a172a46b696e64a4686f7374ab626c6f636b5f636f756e7402ab626c6f636b5f6279746573cd1000a8"
    "6261636b656e647391a373686da66c61796f7574c0a57368617065c0a776657273696f6e02"
)


class TestWire:
    def test_a_card_comes_back_as_it_was(self) -> None:
        made = card("shm", regions=[RegionCard("r", "host", 2, 4096, ["shm"])])
        assert decode_card(encode_card(made)) == made
        assert made.region("r") is not None
        assert made.region("q") is None

    def test_the_bytes_of_a_card_stay_as_they_are(self) -> None:
        """Changed bytes need a new CARD_VERSION."""
        made = card("shm", regions=[RegionCard("r", "host", 2, 4096, ["shm"])])
        assert encode_card(made) == GOLDEN

    @pytest.mark.parametrize("data", [b"", b"\x80", b"hello", b"\xff" * 10, b"x" * (2 << 20)])
    def test_what_is_no_card(self, data: bytes) -> None:
        with pytest.raises(WireError):
            decode_card(data)

    def test_a_card_of_another_version(self) -> None:
        with pytest.raises(TransferRefused, match="has version 99, this process speaks version 2"):
            decode_card(msgspec.msgpack.encode({"version": 99, "anything": "else"}))

    def test_frames(self) -> None:
        data = encode_frame(Take("lease"))
        assert data.hex() == "00000022" + "82a474797065a474616b65a86c656173655f6964a56c65617365" + "3cc33d2761a3a4ba"
        assert frame_length(data[:4]) == len(data) - 4
        assert decode_frame(data[4:]) == Take("lease")
        assert decode_frame(encode_frame(Goodbye())[4:]) == Goodbye()
        for wrong in (b"", b"\x80", b"\x81\xa4type\xa5never"):
            with pytest.raises(WireError, match="damaged"):
                decode_frame(wrong)
        for wrong in (b"\x80", b"\x81\xa4type\xa5never"):
            with pytest.raises(WireError, match="understood"):
                decode_frame(wrong + xxh3_64_intdigest(wrong).to_bytes(8, "little"))
        for length in (0, 1 << 30):
            with pytest.raises(WireError, match="was announced"):
                frame_length(length.to_bytes(4, "big"))
