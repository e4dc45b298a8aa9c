"""What a set of workers is short of: served all the same, but not as it was meant."""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.wire.cards import Role


def shortcomings(roles: Iterable[Role]) -> list[str]:
    """Sentences for a person.

    Args:
        roles: of one model's workers that can be given requests; those that drain or stand still do not count.
    """
    present = set(roles)
    if present == {Role.PREFILL}:
        return ["no decode worker is there: prefill workers serve requests whole"]
    if present == {Role.DECODE}:
        return ["no prefill worker is there: decode workers compute prompts themselves"]
    return []
