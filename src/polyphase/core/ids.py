"""Names for identities, so that a signature says which string or number it wants.

A *worker id* is a name that outlives restarts (`decode-0`); an *epoch* numbers one life of that worker: it is the start time in
nanoseconds, so a later life has a greater one, and whatever carries an older epoch than the known one is refused.
"""

from __future__ import annotations

import secrets
from typing import NewType

WorkerId = NewType("WorkerId", str)
RequestId = NewType("RequestId", str)
Epoch = NewType("Epoch", int)
BlockId = NewType("BlockId", int)  # index of a physical block in one worker's pool
BlockHash = NewType("BlockHash", int)  # 64 bit, one block's tokens and what makes them differ
SequenceHash = NewType("SequenceHash", int)  # 64 bit, the whole prefix up to and including a block; a hint, never proof
ContentKey = NewType("ContentKey", bytes)  # 32 bytes, cryptographic: equal keys mean equal KV


def new_request_id(prefix: str) -> RequestId:
    """`prefix` and 24 random hexadecimal digits, for example `chatcmpl-6f…`."""
    return RequestId(f"{prefix}-{secrets.token_hex(12)}")
