"""The first words on every connection: who calls, which life of whom it expects, what for, and that both know the deployment's token.

    caller ◄── Challenge(nonce) ─────────── called
           ─── Greeting(card, expected epoch, nonce, proof) ──►
           ◄── Welcome(proof) or Refusal ──

A proof is HMAC-SHA256, keyed by the token, of the side's name, both nonces, the purpose and the session. It shows that the other side
holds the token; it does not encrypt what follows. Unix sockets are private to the user and need no proof.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct

import msgspec

from polyphase.core.errors import StaleDescriptor, TransferRefused, WireError
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import CARD_VERSION, AgentCard, Challenge, Greeting, Welcome

NONCE_BYTES = 32


def greet(wire: Wire, mine: AgentCard, theirs: AgentCard, purpose: str, session_id: bytes, token: bytes) -> None:
    """The caller's part. Raises: TransferRefused, StaleDescriptor as the other side says, PeerLost, TransferTimeout, WireError."""
    challenge = expect(wire.receive(), Challenge)
    nonce = secrets.token_bytes(NONCE_BYTES)
    greeting = Greeting(
        purpose=purpose,
        session_id=session_id,
        expected_agent_id=theirs.agent_id,
        expected_epoch=theirs.epoch,
        caller=msgspec.structs.replace(mine, regions=[]),
        nonce=nonce,
        proof=_proof(token, b"caller", challenge.nonce, nonce, purpose, session_id),
    )
    wire.send(greeting)
    welcome = expect(wire.receive(), Welcome)
    if not hmac.compare_digest(welcome.proof, _proof(token, b"called", challenge.nonce, nonce, purpose, session_id)):
        raise TransferRefused(f"{wire.peer} does not know this deployment's token")


def answer(wire: Wire, mine: AgentCard, token: bytes, *, purposes: set[str]) -> Greeting:
    """The called side's part. Raises: TransferRefused, StaleDescriptor after the caller was told; PeerLost, TransferTimeout, WireError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    wire.send(Challenge(nonce))
    greeting = expect(wire.receive(), Greeting)
    key = token if wire.socket.family != socket.AF_UNIX else b""
    try:
        _check(greeting, mine, purposes)
        if not hmac.compare_digest(greeting.proof, _proof(key, b"caller", nonce, greeting.nonce, greeting.purpose, greeting.session_id)):
            raise TransferRefused("the token of this deployment was not given, or is another one")
    except (TransferRefused, StaleDescriptor) as error:
        wire.send(refusal_of(error))
        raise
    wire.send(Welcome(_proof(key, b"called", nonce, greeting.nonce, greeting.purpose, greeting.session_id)))
    return greeting


def _check(greeting: Greeting, mine: AgentCard, purposes: set[str]) -> None:
    if greeting.caller.version != CARD_VERSION:
        raise TransferRefused(f"the caller's agent card has version {greeting.caller.version}, this process speaks {CARD_VERSION}")
    if (greeting.expected_agent_id, greeting.expected_epoch) != (mine.agent_id, mine.epoch):
        raise StaleDescriptor(
            f"agent {greeting.expected_agent_id} of epoch {greeting.expected_epoch} is gone; here is {mine.agent_id} of epoch {mine.epoch}"
        )
    if greeting.purpose not in purposes:
        raise TransferRefused(f"there is no backend {greeting.purpose!r} here, only {', '.join(sorted(purposes))}")
    if len(greeting.session_id) != 16 or len(greeting.nonce) != NONCE_BYTES:
        raise TransferRefused("the greeting has no proper session or nonce")


def _proof(token: bytes, side: bytes, called_nonce: bytes, caller_nonce: bytes, purpose: str, session_id: bytes) -> bytes:
    if not token:
        return b""
    return hmac.digest(token, b"\0".join((side, called_nonce, caller_nonce, purpose.encode(), session_id)), "sha256")


def check_user(connection: socket.socket) -> None:
    """Raises: WireError if the process at the other end of a Unix socket belongs to another user, where the system tells."""
    if connection.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return
    width = struct.calcsize("iII")
    _pid, user_id, _gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, width))
    if user_id != os.getuid():
        raise WireError(f"a process of user {user_id} called and was sent away")
