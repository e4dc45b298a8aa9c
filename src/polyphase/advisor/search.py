"""All deployments of a model on a fleet, evaluated at once, and the few worth having.

engines      every setting (accelerator, backend, precision, serving) by every mapping that fits, with its curves
aggregated   engine by batch, as many replicas as the fleet holds
disaggregated  decode engine by batch by prefill engine by number of workers: as many prefill workers as the decode workers keep busy, and
             one step more or fewer, if both fit their pools; repeated while the fleet lasts

Candidates are made and reduced chunk by chunk, so that memory stays small: of each chunk the frontier of what meets the goal remains, and
the candidate nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyphase.advisor.calibration import Calibration
from polyphase.advisor.curves import DecodeCurves, PrefillCurves, decode_curves, prefill_curves
from polyphase.advisor.deployment import Serving, Setting, Traffic
from polyphase.advisor.fleet import Fleet
from polyphase.advisor.goal import Goal
from polyphase.advisor.mapping import Floats, Mappings, mappings_of
from polyphase.advisor.memory import batch_limit
from polyphase.advisor.points import NO_PREFILL, Candidates, Index, pareto, worst_excess

MAX_ENGINE_GPUS = 72  # of one engine; more would be several
BATCHES = np.unique(np.round(2.0 ** (np.arange(0, 53) / 4)))  # 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16 … 8192: quarter-octaves
_WORKER_COUNTS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 48, 64], dtype=np.float64)
_TARGET_UTILISATION = 0.85  # of prefill workers: beyond it their queue grows without bound
_CHUNK = 400_000
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Engines:
    """Of one setting: mappings that fit its pool, with the curves of both phases and the room for sequences."""

    setting: Setting
    pool: int  # index into the fleet
    decode: DecodeCurves
    prefill: PrefillCurves
    batch_limit: Floats  # float64[m], per rank

    @property
    def mappings(self) -> Mappings:
        return self.decode.mappings

    def __len__(self) -> int:
        return len(self.decode.mappings)


@dataclass(frozen=True, slots=True)
class Found:
    """frontier: of each kind of serving, best tokens per user first. `nearest`: one candidate, the least over the bounds; None if not a
    single one fits in memory.
    """

    engines: tuple[Engines, ...]
    frontier: Candidates
    nearest: Candidates | None
    evaluated: int
    fitting: int  # of the evaluated, how many meet the goal

    def engine_at(self, place: int) -> tuple[Engines, int]:
        """The setting and the row of the engine that a candidate's `decode` or `prefill` names."""
        for engines in self.engines:
            if place < len(engines):
                return engines, place
            place -= len(engines)
        raise IndexError(place)


def engines_for(calibration: Calibration, settings: Sequence[Setting], fleet: Fleet, traffic: Traffic) -> list[Engines]:
    """Without those that do not fit; a setting of which nothing fits is left out."""
    found = []
    for setting in settings:
        pool = next(n for n, pool in enumerate(fleet.pools) if pool.accelerator == setting.accelerator)
        every = Mappings.of(mappings_of(setting.shape, min(fleet.pools[pool].count, MAX_ENGINE_GPUS), backend=setting.backend))
        if not len(every):
            continue
        limit = batch_limit(setting.shape, setting.accelerator, setting.precision, every, traffic.whole_tokens)
        fits = np.flatnonzero(limit >= 1)
        if not len(fits):
            continue
        mappings = every.take(fits)
        decode = decode_curves(calibration, setting, mappings, traffic)
        found.append(Engines(setting, pool, decode, prefill_curves(calibration, setting, mappings, traffic), limit[fits]))
    return found


def search(
    calibration: Calibration,
    settings: Sequence[Setting],
    fleet: Fleet,
    traffic: Traffic,
    goal: Goal,
    on_progress: Progress = lambda _: None,
) -> Found:
    """`on_progress` hears the number of candidates evaluated so far."""
    engines = engines_for(calibration, settings, fleet, traffic)
    evaluated = fitting = 0
    kept: list[Candidates] = []
    nearest: Candidates | None = None
    nearest_excess = np.inf
    for chunk in candidate_chunks(engines, fleet, traffic):
        evaluated += len(chunk)
        on_progress(evaluated)
        excess = worst_excess(chunk.excess(goal, traffic), len(chunk))
        meets = excess <= 1.0
        closest = int(np.argmin(excess))
        if excess[closest] < nearest_excess:
            nearest, nearest_excess = chunk.take(np.array([closest])), float(excess[closest])
        count = int(np.count_nonzero(meets))
        fitting += count
        if count:
            kept.append(_frontier(chunk if count == len(chunk) else chunk.take(meets), traffic))
    frontier = _frontier(Candidates.joined(kept), traffic) if kept else _no_candidates()
    return Found(tuple(engines), frontier, nearest, evaluated, fitting)


def _frontier(candidates: Candidates, traffic: Traffic) -> Candidates:
    """Of each kind of serving its own, so that what splitting gains can be seen; the fastest for the user first."""
    users, gpus = candidates.tok_s_per_user(), candidates.tok_s_per_fleet_gpu(traffic)
    is_whole = candidates.prefill == NO_PREFILL
    kept = [members[pareto(users[members], gpus[members])] for members in (np.flatnonzero(is_whole), np.flatnonzero(~is_whole))]
    rows = np.concatenate(kept)
    return candidates.take(rows[np.argsort(-users[rows], kind="stable")])


def _no_candidates() -> Candidates:
    nowhere: Index = np.zeros(0, dtype=np.intp)
    nothing: Floats = np.zeros(0)
    return Candidates(nowhere, nowhere, *[nothing] * 11)


def candidate_chunks(engines: Sequence[Engines], fleet: Fleet, traffic: Traffic) -> Iterator[Candidates]:
    """Every candidate that the fleet holds, some hundred thousand at a time."""
    offsets = np.cumsum([0, *(len(group) for group in engines)])
    for number, group in enumerate(engines):
        if group.setting.serving is Serving.AGGREGATED:
            yield aggregated(group, int(offsets[number]), fleet, traffic)
    for number, decode in enumerate(engines):
        if decode.setting.serving is not Serving.DISAGGREGATED:
            continue
        for other, prefill in enumerate(engines):
            if prefill.setting.serving is Serving.DISAGGREGATED and _can_hand_over(prefill.setting, decode.setting):
                yield from _disaggregated(decode, int(offsets[number]), prefill, int(offsets[other]), fleet, traffic)


def _can_hand_over(prefill: Setting, decode: Setting) -> bool:
    """The cache must mean the same to both: one engine, one format."""
    return prefill.backend == decode.backend and prefill.precision == decode.precision and prefill.version == decode.version


def aggregated(group: Engines, offset: int, fleet: Fleet, traffic: Traffic) -> Candidates:
    """Every engine at every batch that it has room for, in as many replicas as the pool holds."""
    pool = fleet.pools[group.pool]
    rows, batches = _load(group)
    m = group.mappings
    concurrency = batches * m.dp[rows]
    itl_ms = group.decode.itl_ms(rows, batches)
    ttft_ms = group.prefill.ttft_ms(rows, batches, concurrency, itl_ms)
    engine_gpus = m.gpu_count[rows]
    units = np.floor(pool.count / engine_gpus)
    gpus = units * engine_gpus
    one, zero = np.ones(len(rows)), np.zeros(len(rows))
    return Candidates(
        rows + offset,
        np.full(len(rows), NO_PREFILL),
        one,
        zero,
        units,
        batches,
        concurrency,
        ttft_ms,
        itl_ms,
        gpus,
        np.full(len(rows), float(pool.count)),
        gpus * pool.accelerator.all_in_kw,
        gpus * pool.accelerator.dollars_per_hour,
    )


def _load(group: Engines) -> tuple[Index, Floats]:
    """Every (mapping, batch) with room: int[n], float64[n]."""
    rows, columns = np.nonzero(BATCHES[None, :] <= group.batch_limit[:, None])
    return rows, BATCHES[columns]


def worthwhile_prefill(group: Engines, limit: int = 48) -> Index:
    """Rows of the prefill engines that are not beaten in time alone by any that does more prompts per accelerator and second, or is
    smaller.
    """
    m, p = group.mappings, group.prefill
    per_gpu = m.dp / p.service_ms / m.gpu_count
    front = np.union1d(pareto(-p.alone_ms, per_gpu), pareto(-p.alone_ms, -m.gpu_count))
    if len(front) > limit:
        front = front[np.unique(np.linspace(0, len(front) - 1, limit).astype(np.intp))]
    return front


def _disaggregated(
    decode: Engines, decode_offset: int, prefill: Engines, prefill_offset: int, fleet: Fleet, traffic: Traffic
) -> Iterator[Candidates]:
    rows, batches = _load(decode)
    choices = worthwhile_prefill(prefill)
    for workers in _WORKER_COUNTS:
        is_possible = workers * decode.mappings.gpu_count[rows] < fleet.pools[decode.pool].count + (decode.pool != prefill.pool)
        if not is_possible.any():
            break
        few, loads = rows[is_possible], batches[is_possible]
        step = max(1, _CHUNK // (3 * len(choices)))
        for start in range(0, len(few), step):
            part, load = few[start : start + step], loads[start : start + step]
            pairs = Pairs(
                np.repeat(part, len(choices)), np.repeat(load, len(choices)), float(workers), np.tile(choices, len(part)).astype(np.intp)
            )
            chunk = rate_matched(decode, prefill, pairs, fleet, traffic)
            if len(chunk):
                yield replace(chunk, decode=chunk.decode + decode_offset, prefill=chunk.prefill + prefill_offset)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Decode engine at a batch, `workers` of them, beside a prefill engine; rows of their Engines, all [n]."""

    decode: Index
    batch: Floats
    workers: float
    prefill: Index


def rate_matched(decode: Engines, prefill: Engines, pairs: Pairs, fleet: Fleet, traffic: Traffic) -> Candidates:
    """For each pair up to three candidates: as many prefill workers as keep up, one fewer, one more; those that the fleet holds."""
    d, p = decode.mappings, prefill.mappings
    itl_ms = decode.decode.itl_ms(pairs.decode, pairs.batch)
    concurrency = pairs.workers * pairs.batch * d.dp[pairs.decode]
    service = prefill.prefill.service_ms[pairs.prefill]
    ranks = p.dp[pairs.prefill]
    needed = concurrency * service / (traffic.osl * itl_ms + service) / (_TARGET_UTILISATION * ranks)
    pool_gpus = float(sum(fleet.pools[pool].count for pool in {decode.pool, prefill.pool}))
    parts = []
    for more in (-1.0, 0.0, 1.0):
        count = np.ceil(needed) + more
        decode_gpus = pairs.workers * d.gpu_count[pairs.decode]
        prefill_gpus = count * p.gpu_count[pairs.prefill]
        units = _units(decode_gpus, decode.pool, prefill_gpus, prefill.pool, fleet)
        keep = np.flatnonzero((count >= 1) & (units >= 1))
        if not len(keep):
            continue
        waiting = concurrency[keep] / (count[keep] * ranks[keep])
        ttft_ms = prefill.prefill.ttft_ms(pairs.prefill[keep], waiting, concurrency[keep], itl_ms[keep])
        ttft_ms = prefill.prefill.saturated(pairs.prefill[keep], ttft_ms, waiting, itl_ms[keep])
        accelerators = fleet.pools[decode.pool].accelerator, fleet.pools[prefill.pool].accelerator
        gpus = units[keep] * decode_gpus[keep], units[keep] * prefill_gpus[keep]
        parts.append(
            Candidates(
                pairs.decode[keep],
                pairs.prefill[keep],
                np.full(len(keep), pairs.workers),
                count[keep],
                units[keep],
                pairs.batch[keep],
                concurrency[keep],
                ttft_ms,
                itl_ms[keep],
                gpus[0] + gpus[1],
                np.full(len(keep), pool_gpus),
                gpus[0] * accelerators[0].all_in_kw + gpus[1] * accelerators[1].all_in_kw,
                gpus[0] * accelerators[0].dollars_per_hour + gpus[1] * accelerators[1].dollars_per_hour,
            )
        )
    return Candidates.joined(parts) if parts else _no_candidates()


def _units(decode_gpus: Floats, decode_pool: int, prefill_gpus: Floats, prefill_pool: int, fleet: Fleet) -> Floats:
    """How often a unit fits the fleet."""
    if decode_pool == prefill_pool:
        return np.floor(fleet.pools[decode_pool].count / np.maximum(decode_gpus + prefill_gpus, 1.0))
    decode_count, prefill_count = fleet.pools[decode_pool].count, fleet.pools[prefill_pool].count
    return np.minimum(np.floor(decode_count / decode_gpus), np.floor(prefill_count / np.maximum(prefill_gpus, 1.0)))
