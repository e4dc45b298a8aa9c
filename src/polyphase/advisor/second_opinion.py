"""An estimate of ITL beside measured times of single operators, where somebody has those.

Both are uncertain in their own ways: what was learned from whole deployments knows the engine's overheads and little of a model that nobody
measured; the sum of operators knows the model's shapes and nothing of what happens between them. So they are averaged in logarithms, each
weighed by the inverse of its variance, and where they are further apart than these allow, the interval grows by as much (R. T. Birge,
Physical Review 40, 1932).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, hypot, log
from typing import Protocol

from polyphase.advisor.estimate import Figure, Question

_CENTRAL_80 = 1.2816
OPERATORS_DEVIATION = 0.3  # of the logarithm; AIConfigurator 0.12 against measured serving, see docs/advisor.md


class OperatorTables(Protocol):
    """Measured operators, summed over a model's layers."""

    def itl_ms(self, question: Question) -> float:
        """Raises: NoAnswer."""


class NoAnswer(Exception):
    """The tables do not hold what the question needs; the message says what."""


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    itl_ms: float  # of the operators alone
    together: Figure

    def contradicts(self, own: Figure) -> bool:
        """Whether it lies outside of the own interval."""
        return not own.covers(self.itl_ms)


def taken_together(own: Figure, itl_ms: float) -> SecondOpinion:
    """`own`: the estimate; `itl_ms`: what the operators say."""
    own_deviation = log(own.high / own.value) / _CENTRAL_80
    weight = OPERATORS_DEVIATION**2 / (OPERATORS_DEVIATION**2 + own_deviation**2)  # of the own estimate
    value = exp(weight * log(own.value) + (1 - weight) * log(itl_ms))
    apart = abs(log(itl_ms / own.value)) / hypot(own_deviation, OPERATORS_DEVIATION)
    deviation = own_deviation * weight**0.5 * max(1.0, apart)
    half = exp(_CENTRAL_80 * deviation)
    return SecondOpinion(itl_ms, Figure(value, value / half, value * half, deviation))
