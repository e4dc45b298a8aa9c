"""One engine step's time from what is in it, in plain arithmetic: for the mock engine and the twin, which ask once a step.

  what there is in every step       dense weights, latencies of layers and collectives
+ experts                           those that the step's tokens touch
+ each decoding row                 its products and messages, and the cache that it sees
+ each prompt token                 the same with the weights of prefill, and the attention to the tokens before it

The same terms and weights as an estimate's, which is their sum over the steps of a whole request.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import numpy as np

from polyphase.advisor.calibration import Calibration
from polyphase.advisor.counts import DECODE_TERMS, PREFILL_TERMS, decode_terms, prefill_terms
from polyphase.advisor.deployment import Setting, Traffic
from polyphase.advisor.efficiency import ITL_PRIORS
from polyphase.advisor.mapping import Mappings, ParallelMapping
from polyphase.advisor.residual import quantities_of

_CONTEXT = 4096.0  # tokens at which the cache's cost per token is taken: windowed layers read less of longer contexts
_TYPICAL_BATCH = 32.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds. Make it with `step_times`."""

    fixed_ms: float
    row_ms: float  # of a decoding row
    context_token_ms: float  # of a token that a decoding row sees
    prompt_token_ms: float
    pair_ms: float  # of a prompt token with a token before it
    all_experts_ms: float  # of reading all that an accelerator holds
    untouched: float  # chance that one token leaves an expert alone
    ranks: int  # data parallel: their tokens meet at the experts

    def step_ms(self, rows: int, context_tokens: int, prompt_tokens: int = 0, pairs: float = 0.0) -> float:
        """Of one data parallel rank, the others being as busy. `rows` decode and see `context_tokens` in all; `prompt_tokens` are computed,
        and `pairs` are the sum over them of the tokens that each sees.
        """
        experts = self.all_experts_ms * (1.0 - self.untouched ** ((rows + prompt_tokens) * self.ranks)) if self.all_experts_ms else 0.0
        decoding = rows * self.row_ms + context_tokens * self.context_token_ms
        return self.fixed_ms + experts + decoding + prompt_tokens * self.prompt_token_ms + pairs * self.pair_ms


def step_times(calibration: Calibration, setting: Setting, mapping: ParallelMapping, traffic: Traffic | None = None) -> StepTimes:
    """What was learned about the whole deployment is taken at `traffic` (1,024/1,024 by default) and a batch of 32, as one factor."""
    traffic = traffic or Traffic(1024, 1024)
    m = Mappings.of([mapping])
    weights = dict(zip(ITL_PRIORS, map(float, calibration.weights("itl", setting)), strict=True))
    one, two = (_decode(setting, m, batch) for batch in (1.0, 2.0))
    terms = prefill_terms(setting.shape, setting.accelerator, setting.precision, m, _CONTEXT, 0.0)
    prompt = dict(zip(PREFILL_TERMS, map(float, terms[0]), strict=True))
    rows = quantities_of(m, np.array([_TYPICAL_BATCH]), np.array([traffic.isl]), np.array([traffic.osl]))
    learned = calibration.itl_residual.grid_mean(calibration.categories(setting), rows[:, 1:], rows[:, 0])
    factor = exp(float(learned[0, 0]))
    fixed = ("weights", "layers", "expert_layers", "collectives", "step", *(("unpack",) if not setting.shape.experts else ()))
    by_row = ("flops", "expert_flops", "reduce", "exchange", "rows")
    row = sum(weights[name] * (two[name] - one[name]) for name in by_row)
    comm = weights["beside_comm"] * (prompt["reduce"] + prompt["exchange"])
    token = (weights["beside_flops"] * (prompt["flops"] + prompt["expert_flops"]) + comm) / _CONTEXT
    shape = setting.shape
    experts = _decode(setting, m, 1e7) if shape.experts else {"experts": 0.0, "unpack": 0.0}
    unpack = weights["unpack"] * experts["unpack"] if shape.experts else 0.0
    return StepTimes(
        fixed_ms=factor * sum(weights[name] * one[name] for name in fixed),
        row_ms=factor * row,
        context_token_ms=factor * weights["attention"] * one["attention"] / _CONTEXT,
        prompt_token_ms=factor * token,
        pair_ms=factor * weights["beside_attention"] * prompt["attention"] / (_CONTEXT**2 / 2),
        all_experts_ms=factor * (weights["experts"] * experts["experts"] + unpack),
        untouched=1.0 - shape.experts.active_count / shape.experts.expert_count if shape.experts else 0.0,
        ranks=mapping.dp,
    )


def _decode(setting: Setting, mappings: Mappings, batch: float) -> dict[str, float]:
    terms = decode_terms(setting.shape, setting.accelerator, setting.precision, mappings, np.array([batch]), _CONTEXT)
    return dict(zip(DECODE_TERMS, map(float, terms[0]), strict=True))
