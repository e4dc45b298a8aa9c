"""How agents of the transfer library find, greet and answer each other.

An *agent card* is what one process publishes of itself: its name and life, where it listens, what memory it has registered and which
backends it can be reached through. It travels inside offers or by any other means, as msgpack bytes of `encode_card`. Frames between
agents are msgpack too: a length of four bytes, big-endian, one of the structs below, tagged by name, and XXH3-64 of the struct's bytes,
little-endian, which the length includes. A damaged frame is an error, and so cannot ask for, or vouch for, other blocks than were meant.
"""

from __future__ import annotations

import msgspec
from xxhash import xxh3_64_intdigest

from polyphase.core.errors import TransferRefused, WireError
from polyphase.wire.layout import KvLayout, KvShape

CARD_VERSION = 2  # raised with every change that an agent of the version before would misread
SUM_BYTES = 8
MAX_CARD_BYTES = 1 << 20
MAX_FRAME_BYTES = 16 << 20
MAX_NOTIFICATION_BYTES = 64 << 10


class RegionCard(msgspec.Struct, frozen=True):
    """Registered memory: `block_count` blocks of `block_bytes` bytes, back to back."""

    region_id: str  # random, new with each registration
    kind: str  # "host" or "cuda"
    block_count: int
    block_bytes: int
    backends: list[str]  # through which a peer can reach this memory
    layout: KvLayout | None = None  # None: bytes without a meaning to others
    shape: KvShape | None = None  # for peers whose blocks have another one


class BackendCard(msgspec.Struct, frozen=True):
    """What a peer has to know to judge whether it can use this backend. `facts` are the backend's own words."""

    name: str
    facts: dict[str, str] = {}


class AgentCard(msgspec.Struct, frozen=True):
    """One life of one agent."""

    agent_id: str
    epoch: int  # greater in each later life
    host_id: str  # equal on two agents of one running system
    user_id: int
    unix_path: str  # empty: does not listen on a Unix socket
    tcp_address: str  # "host:port"; empty: cannot be reached from other hosts
    has_token: bool  # TCP connections must prove that they know the deployment's token
    backends: list[BackendCard]
    regions: list[RegionCard] = []
    version: int = CARD_VERSION

    def region(self, region_id: str) -> RegionCard | None:
        return next((region for region in self.regions if region.region_id == region_id), None)

    def backend(self, name: str) -> BackendCard | None:
        return next((backend for backend in self.backends if backend.name == name), None)


class BlockOffer(msgspec.Struct, frozen=True):
    """Blocks that `agent` keeps for a peer under a lease; `agent.regions` holds the region at least."""

    agent: AgentCard
    region_id: str
    block_ids: list[int]
    generations: list[int]
    lease_id: str
    ttl_ms: int  # from when the offer was made


class _Versioned(msgspec.Struct):
    version: int


def encode_card(card: AgentCard) -> bytes:
    return msgspec.msgpack.encode(card)


def decode_card(data: bytes) -> AgentCard:
    """Raises: WireError if `data` is no agent card; TransferRefused if it is one of another version."""
    if len(data) > MAX_CARD_BYTES:
        raise WireError(f"an agent card of {len(data)} bytes was received; none has more than {MAX_CARD_BYTES}")
    try:
        version = msgspec.msgpack.decode(data, type=_Versioned).version
        if version != CARD_VERSION:
            raise TransferRefused(f"the peer's agent card has version {version}, this process speaks version {CARD_VERSION}")
        return msgspec.msgpack.decode(data, type=AgentCard)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"what was received is not an agent card: {error}") from error


# The first frames of every connection.


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """From the agent that was called, before anything else."""

    nonce: bytes


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """From the caller. `purpose` is "control", "notify" or the name of a backend."""

    purpose: str
    session_id: bytes  # random; the same on all connections of one session
    expected_agent_id: str
    expected_epoch: int
    caller: AgentCard
    nonce: bytes
    proof: bytes  # of the token; empty if there is none


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    proof: bytes


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    code: str  # of the error that the caller is to raise
    reason: str


# On control connections: one way, no answers.


class Take(msgspec.Struct, frozen=True, tag="take"):
    """The sender reads blocks of this lease; the lease ends at the latest with this connection."""

    lease_id: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The sender has what it wanted."""

    lease_id: str


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The sender closes on purpose."""


class Notification(msgspec.Struct, frozen=True, tag="notification"):
    payload: bytes


# On data connections of the backends: a request and its answer, in turns.


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Shared memory: hand over the descriptor of a region."""

    region_id: str


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The descriptor rides along."""


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Send these blocks; `block_ids` and `generations` are little-endian 64-bit words."""

    region_id: str
    block_ids: bytes
    generations: bytes
    time_left_ms: int


class Write(msgspec.Struct, frozen=True, tag="write"):
    """These blocks follow: their bytes, then a `Sums` frame."""

    region_id: str
    block_ids: bytes
    generations: bytes
    time_left_ms: int


class Pull(msgspec.Struct, frozen=True, tag="pull"):
    """Shared and device memory: copy these blocks of mine into yours; a write that the owner of the target performs."""

    source: RegionCard
    source_block_ids: bytes
    source_generations: bytes
    region_id: str
    block_ids: bytes
    generations: bytes
    time_left_ms: int


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Which of these blocks have the generation that I expect?"""

    region_id: str
    block_ids: bytes
    generations: bytes


class Verdicts(msgspec.Struct, frozen=True, tag="verdicts"):
    """One byte for each block asked for, as `polyphase.transfer.verdicts.Verdict`. After a `Read`, the bytes of the good ones follow."""

    verdicts: bytes


class Sums(msgspec.Struct, frozen=True, tag="sums"):
    """After the blocks: XXH3-64 of each, little-endian words, and what became of each while it was sent."""

    sums: bytes
    verdicts: bytes
    request: int  # `request_digest` of the `Read` or `Write` that they belong to: not of the one before or after


class Facts(msgspec.Struct, frozen=True, tag="facts"):
    """What a backend exchanges of its own library's words."""

    data: bytes


Frame = (
    Challenge
    | Greeting
    | Welcome
    | Refusal
    | Take
    | Release
    | Goodbye
    | Notification
    | Open
    | Opened
    | Read
    | Write
    | Pull
    | Check
    | Verdicts
    | Sums
    | Facts
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode_frame(frame: Frame) -> bytes:
    """With its length in front. Raises: WireError if it is too long to be accepted at the other end."""
    body = _encoder.encode(frame)
    body += xxh3_64_intdigest(body).to_bytes(SUM_BYTES, "little")
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {len(body)} bytes cannot be sent; {MAX_FRAME_BYTES} is the most")
    return len(body).to_bytes(4, "big") + body


def frame_length(header: bytes) -> int:
    """Raises: WireError if no frame is that long."""
    length = int.from_bytes(header, "big")
    if not 0 < length <= MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes was announced; {MAX_FRAME_BYTES} is the most")
    return length


def decode_frame(body: bytes | bytearray) -> Frame:
    """What follows the length. Raises: WireError if it was damaged or is none of the frames above."""
    content = memoryview(body)[:-SUM_BYTES]
    if len(body) <= SUM_BYTES or xxh3_64_intdigest(content) != int.from_bytes(body[-SUM_BYTES:], "little"):
        raise WireError("a frame between agents was damaged on its way")
    try:
        return _decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"a frame between agents cannot be understood: {error}") from error


def request_digest(request: Read | Write) -> int:
    """Which blocks, under which generations: XXH3-64."""
    return xxh3_64_intdigest(b"\0".join((request.region_id.encode(), request.block_ids, request.generations)))
