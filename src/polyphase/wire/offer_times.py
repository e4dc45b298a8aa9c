"""The time until an offer ends, where it crosses from one process to another: clocks of different hosts have nothing in common.

In memory, `expires_at_ns` is a time of the holder's own monotonic clock. In a message, the same field holds how long it still was when the
message was sent. A reader takes off a margin for the way; if the way took longer, it may ask for blocks that are gone, which their
generations tell.
"""

from __future__ import annotations

import msgspec

from polyphase.wire.requests import FromWorker, SequenceOutput, StepOutputs, Submit, ToWorker

MARGIN_NS = 100_000_000


def for_worker(message: ToWorker, now_ns: int) -> ToWorker:
    """As it is sent."""
    return _shift_request(message, -now_ns)


def from_frontend(message: ToWorker, now_ns: int) -> ToWorker:
    """As it was received."""
    return _shift_request(message, now_ns - MARGIN_NS)


def for_frontend(message: FromWorker, now_ns: int) -> FromWorker:
    """As it is sent."""
    return _shift_outputs(message, -now_ns)


def from_worker(message: FromWorker, now_ns: int) -> FromWorker:
    """As it was received."""
    return _shift_outputs(message, now_ns - MARGIN_NS)


def _shift_request(message: ToWorker, by_ns: int) -> ToWorker:
    if not isinstance(message, Submit) or message.offer is None:
        return message
    offer = message.offer
    return msgspec.structs.replace(message, offer=msgspec.structs.replace(offer, expires_at_ns=offer.expires_at_ns + by_ns))


def _shift_outputs(message: FromWorker, by_ns: int) -> FromWorker:
    if not isinstance(message, StepOutputs) or all(output.offer is None for output in message.outputs):
        return message
    return msgspec.structs.replace(message, outputs=[_shift_output(output, by_ns) for output in message.outputs])


def _shift_output(output: SequenceOutput, by_ns: int) -> SequenceOutput:
    offer = output.offer
    if offer is None:
        return output
    return msgspec.structs.replace(output, offer=msgspec.structs.replace(offer, expires_at_ns=offer.expires_at_ns + by_ns))
