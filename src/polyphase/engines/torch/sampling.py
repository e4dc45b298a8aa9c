"""From logits to tokens, for a whole batch at once.

    logits ─► logit_bias, forbidden tokens ─► penalties ─► grammar ─► ÷ temperature ─► min_p, top_k, top_p ─► token
       └────► log-probabilities

Penalties: presence and frequency count output tokens only; repetition looks at the prompt, too. Log-probabilities are those of the model
itself, before all of this. Source: both as in vLLM's default, whose order of steps this is; the penalties are OpenAI's and CTRL's.

A token is drawn by inverting the cumulative distribution, in the order of the vocabulary, at `uniform(seed, position)`. What is drawn
for a row depends on nothing but its own logits and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyphase.engines.batching.outcome import SampledToken
from polyphase.engines.batching.sampling_state import SamplingState, uniform
from polyphase.wire.requests import TokenLogprob

_NUCLEUS_CANDIDATES = 1024  # top_p looks at these first; they nearly always hold enough of the mass


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and who wants a token from it."""

    state: SamplingState
    position: int  # output tokens before this one
    forbidden_ids: frozenset[int] = frozenset()
    allowed: bytes | None = None  # byte[vocab], 0 for what the row's grammar does not let come next; None: it has none


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
    """Choose one token for each row.

    Args:
        logits: float[rows, vocab], any float type.

    Returns: a token each, or None where the logits are not numbers and nothing can be chosen.
    """
    if all(row.state.is_plain and not row.forbidden_ids and row.allowed is None for row in rows):
        best = logits.max(dim=-1)  # NaN counts as the greatest
        return [
            None if math.isnan(value) else SampledToken(token_id)
            for value, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    raw = logits.float()
    adjusted = _adjusted(raw, rows)
    values, chosen = adjusted.max(dim=-1)
    is_valid = ~values.isnan() & (values != -math.inf)
    drawn = [i for i, row in enumerate(rows) if not row.state.is_greedy]
    if drawn:
        index = torch.tensor(drawn, device=raw.device)
        chosen[index], is_drawn_valid = _draw(adjusted[index], [rows[i] for i in drawn])
        is_valid[index] &= is_drawn_valid
    logprobs = _logprobs(raw, chosen, rows)
    return [
        SampledToken(token_id, logprob) if valid else None
        for token_id, valid, logprob in zip(chosen.tolist(), is_valid.tolist(), logprobs, strict=True)
    ]


def _adjusted(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits with bias, forbidden tokens, penalties and grammars; `raw` itself stays as it is."""
    if not any(row.forbidden_ids or row.allowed or row.state.params.logit_bias or row.state.has_penalties for row in rows):
        return raw
    logits = raw.clone()
    for line, row in zip(logits, rows, strict=True):
        params = row.state.params
        if params.logit_bias:
            line.index_add_(0, _ids(params.logit_bias, raw), torch.tensor(list(params.logit_bias.values()), device=raw.device))
        if row.forbidden_ids and not _leaves_nothing(row):
            line[_ids([i for i in row.forbidden_ids if 0 <= i < raw.shape[-1]], raw)] = -math.inf
        if row.state.has_penalties:
            _penalise(line, row.state)
        if row.allowed is not None:
            allowed = torch.frombuffer(bytearray(row.allowed), dtype=torch.uint8).to(raw.device)
            line.masked_fill_(allowed == 0, -math.inf)
    return logits


def _leaves_nothing(row: SamplingRow) -> bool:
    """Whether all that the row's grammar allows is forbidden: the sentence has to end, although `min_tokens` are not there yet."""
    allowed = row.allowed
    if allowed is None:
        return False
    return len(allowed) - allowed.count(0) == sum(allowed[i] != 0 for i in row.forbidden_ids if 0 <= i < len(allowed))


def _penalise(line: Tensor, state: SamplingState) -> None:
    params = state.params
    if params.repetition_penalty != 1 and state.seen_ids:
        seen = _ids(state.seen_ids, line)
        values = line[seen]
        line[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and state.output_counts:
        counts = torch.tensor(list(state.output_counts.values()), dtype=line.dtype, device=line.device)
        line[_ids(state.output_counts, line)] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """Tokens int64[rows] and whether each could be drawn, bool[rows]."""
    device = logits.device
    temperatures = torch.tensor([row.state.params.temperature for row in rows], device=device)
    scaled = _filtered(logits / temperatures[:, None], rows)
    cumulative = torch.softmax(scaled.double(), dim=-1).cumsum(dim=-1)
    numbers = [uniform(row.state.params.seed, row.position) for row in rows]
    target = torch.tensor(numbers, dtype=torch.float64, device=device) * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1), ~cumulative[:, -1].isnan()


def _filtered(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Minus infinity for all tokens below the row's threshold. Tokens that tie with the threshold stay."""
    vocab_size = scaled.shape[-1]
    params = [row.state.params for row in rows]
    wanted = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1 or p.min_p > 0]
    if not wanted:
        return scaled
    index = torch.tensor(wanted, device=scaled.device)
    some = scaled[index]
    top_k = torch.tensor([params[i].top_k or vocab_size for i in wanted], device=scaled.device).clamp(max=vocab_size)
    top_p = torch.tensor([params[i].top_p for i in wanted], dtype=torch.float64, device=scaled.device)
    min_p = torch.tensor([params[i].min_p for i in wanted], dtype=some.dtype, device=scaled.device)
    threshold = torch.maximum(_rank_threshold(some, top_k, top_p), some.amax(dim=-1) + min_p.log())
    scaled[index] = some.masked_fill(some < threshold[:, None], -math.inf)
    return scaled


def _rank_threshold(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least logit that each row keeps: among its `top_k` greatest, the first ones that together have `top_p` of their mass."""
    vocab_size = logits.shape[-1]
    is_ranked = (top_k < vocab_size) | (top_p < 1)
    if not bool(is_ranked.any()):
        return torch.full_like(logits[:, 0], -math.inf)
    limited = top_k[top_k < vocab_size]
    width = int(limited.max()) if len(limited) else 1
    if bool(((top_k == vocab_size) & (top_p < 1)).any()):
        width = min(vocab_size, max(width, _NUCLEUS_CANDIDATES))
    total = torch.logsumexp(logits.double(), dim=-1, keepdim=True)
    while True:
        greatest = logits.topk(width, dim=-1).values
        mass = (greatest.double() - total).exp()
        is_within = torch.arange(width, device=logits.device) < top_k[:, None]
        mass = mass * is_within
        # The mass that top_p is a part of: all tokens, or those that top_k left.
        whole = torch.where(top_k < vocab_size, mass.sum(dim=-1), torch.ones_like(top_p))
        reach = mass.sum(dim=-1)
        is_short = (top_p < 1) & (reach < top_p * whole)
        if width == vocab_size or not bool(is_short.any()):
            break
        width = vocab_size
    before = mass.cumsum(dim=-1) - mass
    keeps = is_within & ((before < (top_p * whole)[:, None]) | (top_p >= 1)[:, None])
    kept_count = keeps.sum(dim=-1).clamp(min=1)
    threshold = greatest.gather(1, kept_count[:, None] - 1).squeeze(1)
    return threshold.masked_fill(~is_ranked, -math.inf)


def _logprobs(raw: Tensor, chosen: Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprob | None]:
    wanted = [i for i, row in enumerate(rows) if row.state.params.top_logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(rows)
    if not wanted:
        return found
    index = torch.tensor(wanted, device=raw.device)
    logprobs = torch.log_softmax(raw[index], dim=-1)
    own = logprobs.gather(1, chosen[index][:, None]).squeeze(1).tolist()
    width = min(raw.shape[-1], max(rows[i].state.params.top_logprobs or 0 for i in wanted))
    top = logprobs.topk(width, dim=-1)
    ids, values = top.indices.tolist(), top.values.tolist()
    tokens = chosen.tolist()
    for place, i in enumerate(wanted):
        count = rows[i].state.params.top_logprobs or 0
        pairs = list(zip(ids[place][:count], values[place][:count], strict=True))
        found[i] = TokenLogprob(tokens[i], own[place], pairs)
    return found


def _ids(token_ids: Sequence[int] | set[int] | dict[int, int] | dict[int, float], like: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=like.device)
