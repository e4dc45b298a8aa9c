"""What a worker of a role is for, and how its role changes while it serves.

    role      prefill legs   everything else (decode legs, whole requests)
    prefill   yes            no
    decode    no             yes
    both      yes            yes

A change of role interrupts nothing: what runs goes on, and frontends ask for what they would rather have elsewhere. Only a submit that
was meant for the role before is refused. So nothing can be lost between the worker's view and a frontend's.
"""

from __future__ import annotations

from polyphase.core.errors import RoleChanged
from polyphase.wire.cards import ModelCard, Role, WorkerEntry
from polyphase.wire.requests import Submit


def takes(role: Role, *, wants_hand_over: bool) -> bool:
    return role is Role.BOTH or wants_hand_over == (role is Role.PREFILL)


def refuse_misdirected(request: Submit, entry: WorkerEntry) -> None:
    """Raises: RoleChanged for what was meant for an earlier role and is nothing for this one."""
    if request.for_role in (None, entry.role) or takes(entry.role, wants_hand_over=request.hand_over):
        return
    raise RoleChanged(f"worker {entry.worker_id} is a {entry.role} worker now, no longer {request.for_role}", request_id=request.request_id)


def why_not_switch(role: Role, entry: WorkerEntry, card: ModelCard) -> str | None:
    """A sentence if this worker cannot take the role."""
    if entry.is_draining:
        return f"worker {entry.worker_id} is draining: it takes no requests any more, whatever its role"
    if role is not entry.role and not card.serves_whole:
        return f"worker {entry.worker_id} stays a {entry.role} worker: its engine ({card.engine}) was started to do this half only"
    if role is Role.PREFILL and not card.can_hand_over:
        return f"worker {entry.worker_id} cannot be a prefill worker: its KV cannot be handed over (engine {card.engine})"
    return None
