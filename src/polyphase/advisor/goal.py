"""What is wanted: the traffic, and the bounds that an answer must keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from polyphase.advisor.deployment import Traffic
from polyphase.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Goal:
    """Upper bounds, None where there is none; `tok_s_per_user` is a lower bound. Bounds are on a deployment, not on one of its engines."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    latency_ms: float | None = None  # of a whole request
    tok_s_per_user: float | None = None
    power_kw: float | None = None  # all-in
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigurationError(f"the bound on {entry.name} must be more than 0, not {value:g}")

    @property
    def longest_itl_ms(self) -> float | None:
        bounds = [bound for bound in (self.itl_ms, 1e3 / self.tok_s_per_user if self.tok_s_per_user else None) if bound is not None]
        return min(bounds, default=None)

    def check_against(self, traffic: Traffic) -> None:
        """Raises: ConfigurationError if two bounds contradict each other, whatever the hardware."""
        if self.itl_ms is not None and self.tok_s_per_user is not None and 1e3 / self.tok_s_per_user > self.itl_ms * 1.000001:
            return  # both are upper bounds on the ITL; the tighter one counts
        if self.latency_ms is not None and self.ttft_ms is not None and self.ttft_ms > self.latency_ms and traffic.osl > 1:
            raise ConfigurationError(
                f"TTFT up to {self.ttft_ms:g} ms and whole requests within {self.latency_ms:g} ms contradict each other: "
                "the first token would be allowed later than the last; drop one, or make the latency longer"
            )


NO_GOAL = Goal()


def traffic_from_requests(
    input_tokens: Sequence[float], output_tokens: Sequence[float], cached_share: float = 0.0, weights: Sequence[float] | None = None
) -> Traffic:
    """One kind of request with the same load as a mixture, from a distribution or a trace: the mean prompt and answer, and the context that
    decode steps see on average, which long answers see longest.

    Raises: ConfigurationError if there are none, or lengths that are not positive.
    """
    isl, osl = np.asarray(input_tokens, dtype=np.float64), np.asarray(output_tokens, dtype=np.float64)
    if not len(isl) or len(isl) != len(osl):
        raise ConfigurationError("the traffic holds no requests, or not an output length for each input length")
    if not (isl > 0).all() or not (osl > 0).all():
        raise ConfigurationError("the traffic has requests without input or output tokens")
    share = np.ones(len(isl)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    mean_isl, mean_osl = float(share @ isl), float(share @ osl)
    context = float(share @ (osl * (isl + osl / 2)) / mean_osl)
    return Traffic(mean_isl, mean_osl, cached_share * mean_isl, context, float((isl + osl).max()))
