"""The question that people ask, and its answer: the frontier, the best few with reasons, or what stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polyphase.advisor.accelerators import Accelerator
from polyphase.advisor.calibration import Basis, Calibration
from polyphase.advisor.deployment import NO_SPECULATION, Serving, Setting, Speculation, Traffic
from polyphase.advisor.estimate import Estimate, Question, estimate
from polyphase.advisor.fleet import Fleet
from polyphase.advisor.goal import NO_GOAL, Goal
from polyphase.advisor.mapping import Mappings, ParallelMapping, mappings_of
from polyphase.advisor.memory import missing_bytes, weight_bytes
from polyphase.advisor.points import NO_PREFILL, Candidates
from polyphase.advisor.precision import Peak, Precision, parse_precision
from polyphase.advisor.search import MAX_ENGINE_GPUS, Engines, Found, search
from polyphase.advisor.shapes import ModelShape
from polyphase.core.errors import ConfigurationError

BACKENDS = ("trtllm", "sglang", "vllm")
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Empty sequences mean: whatever may be of use."""

    shape: ModelShape
    fleet: Fleet
    traffic: Traffic
    goal: Goal = NO_GOAL
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    servings: tuple[Serving, ...] = tuple(Serving)
    speculation: Speculation = NO_SPECULATION
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """`workers` engines of one kind."""

    setting: Setting
    mapping: ParallelMapping
    workers: int


@dataclass(frozen=True, slots=True)
class Option:
    """One deployment: `units` times (decode and, where it is apart, prefill)."""

    decode: Part
    prefill: Part | None
    units: int
    batch: int  # sequences per data parallel rank of the decode engine
    concurrency: float  # of one unit
    gpu_count: int
    idle_gpus: int  # of the pools in use, too few for another unit
    power_kw: float
    dollars_per_hour: float
    estimate: Estimate
    requests_per_s: float
    tok_s_per_gpu: float
    tok_s_per_mw: float
    dollars_per_mtok: float
    joule_per_token: float  # all-in
    board_joule_per_token: float  # accelerator boards at their limit

    @property
    def is_disaggregated(self) -> bool:
        return self.prefill is not None

    @property
    def unit_gpus(self) -> int:
        return self.gpu_count // self.units

    @property
    def layout(self) -> str:
        """`2 x (3 prefill TP1 + 1 decode TP4)`."""
        if self.prefill is None:
            return f"{self.units} x {self.decode.mapping}"
        inner = f"{self.prefill.workers} prefill {self.prefill.mapping} + {self.decode.workers} decode {self.decode.mapping}"
        return f"{self.units} x ({inner})" if self.units > 1 else inner


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Nothing meets the goal: what comes nearest, which bound it breaks most, and to what that would have to give way."""

    option: Option
    bound: str  # a field of Goal
    wanted: float
    reached: float

    @property
    def factor(self) -> float:
        return max(self.wanted / self.reached, self.reached / self.wanted)


@dataclass(frozen=True, slots=True)
class Advice:
    inquiry: Inquiry
    frontier: list[Option]  # fastest for the user first
    best: list[Option]  # most tokens from the fleet first, of different kinds
    shortfall: Shortfall | None
    evaluated: int
    fitting: int


def settings_for(inquiry: Inquiry) -> list[Setting]:
    """Every accelerator of the fleet with every engine, precision and kind of serving that is asked for or makes sense.

    Raises: ConfigurationError if an engine is unknown, or does not run on any of the accelerators.
    """
    for backend in inquiry.backends:
        if backend not in BACKENDS:
            raise ConfigurationError(f"there is no engine {backend!r} that the advisor knows; choose of {', '.join(BACKENDS)}")
    found = []
    for pool in inquiry.fleet.pools:
        backends = inquiry.backends or BACKENDS
        usable = [b for b in backends if b != "trtllm" or pool.accelerator.vendor == "NVIDIA"]
        precisions = [parse_precision(text) for text in inquiry.precisions] or sensible_precisions(inquiry.shape, pool.accelerator)
        found += [
            Setting(inquiry.shape, pool.accelerator, precision, backend, inquiry.version, serving, inquiry.speculation)
            for serving in inquiry.servings
            for backend in usable
            for precision in precisions
        ]
    if not found:
        raise ConfigurationError(
            f"none of the engines {', '.join(inquiry.backends)} runs on {inquiry.fleet}; TensorRT-LLM needs NVIDIA accelerators"
        )
    return found


def sensible_precisions(shape: ModelShape, accelerator: Accelerator) -> list[Precision]:
    """The published format, and the widest and the narrowest in which the accelerator computes and checkpoints are made."""
    native = parse_precision(shape.native_precision)
    if "+" in shape.native_precision:
        return [native]
    if native.gemm.bytes_per_weight < 1:  # nobody widens what was rounded to 4 bits; engines expand it as they go where units are missing
        names = {shape.native_precision}
    else:
        names = {shape.native_precision, "fp8"} if accelerator.peak(Peak.FP8) > accelerator.peak(Peak.BF16) else {"bf16"}
    if accelerator.peak(Peak.FP4) > accelerator.peak(Peak.FP8):
        names.add("nvfp4")
    if shape.native_precision.startswith("fp8"):
        names.discard("fp8" if shape.native_precision == "fp8_block" else "")
    return [parse_precision(name) for name in sorted(names)]


def advise(calibration: Calibration, inquiry: Inquiry, top: int = 5, on_progress: Progress = lambda _: None) -> Advice:
    """Raises: ConfigurationError if the question contradicts itself, or the model fits nowhere (by how much is in the message)."""
    inquiry.goal.check_against(inquiry.traffic)
    check_lengths(inquiry)
    settings = settings_for(inquiry)
    found = search(calibration, settings, inquiry.fleet, inquiry.traffic, inquiry.goal, on_progress)
    if found.nearest is None:
        raise ConfigurationError(why_nothing_fits(inquiry, settings))
    options = [option_at(calibration, found, found.frontier, row, inquiry) for row in _spread(found.frontier, inquiry.traffic)]
    ranked = sorted(options, key=lambda option: -option.requests_per_s)
    shortfall = None if options else _shortfall(calibration, found, inquiry)
    return Advice(inquiry, options, _of_different_kinds(ranked, top), shortfall, found.evaluated, found.fitting)


def check_lengths(inquiry: Inquiry) -> None:
    """Raises: ConfigurationError."""
    traffic = inquiry.traffic
    if traffic.isl < 1 or traffic.osl < 1:
        raise ConfigurationError(f"requests need at least one input and one output token, not {traffic.isl:g} and {traffic.osl:g}")
    if traffic.cached_tokens >= traffic.isl:
        raise ConfigurationError(f"a prefix hit of {traffic.cached_tokens:,.0f} tokens leaves nothing of prompts of {traffic.isl:g} tokens")
    if traffic.whole_tokens > inquiry.shape.context_length:
        raise ConfigurationError(
            f"requests of {traffic.whole_tokens:,.0f} tokens are longer than what {inquiry.shape.name} was made for, "
            f"{inquiry.shape.context_length:,} tokens"
        )


def why_nothing_fits(inquiry: Inquiry, settings: Sequence[Setting]) -> str:
    """The setting that lacks least, and what it lacks."""
    worst: list[tuple[float, Setting, ParallelMapping]] = []
    for setting in settings:
        pool = next(pool for pool in inquiry.fleet.pools if pool.accelerator == setting.accelerator)
        for mapping in mappings_of(setting.shape, min(pool.count, MAX_ENGINE_GPUS), backend=setting.backend):
            lacks = missing_bytes(setting.shape, setting.accelerator, setting.precision, mapping, inquiry.traffic.whole_tokens)
            worst.append((lacks, setting, mapping))
    lacks, setting, mapping = min(worst, key=lambda entry: entry[0])
    if lacks <= 0:
        return (
            f"{inquiry.shape.name} fits on {inquiry.fleet} as a whole, but no way to serve it "
            f"({', '.join(s.value for s in inquiry.servings)}) leaves an accelerator for every part; "
            "give more accelerators, or allow aggregated serving"
        )
    weights = float(weight_bytes(setting.shape, setting.precision, Mappings.of([mapping]))[0])
    return (
        f"{inquiry.shape.name} does not fit on {inquiry.fleet}: even as {setting.precision.name} over {mapping}, "
        f"each {setting.accelerator.name} would have to hold {weights / 1e9:.1f} GB of weights, and lacks {lacks / 1e9:.1f} GB "
        f"with working room and one request of {inquiry.traffic.whole_tokens:g} tokens; give more accelerators, or a narrower precision"
    )


def option_at(calibration: Calibration, found: Found, candidates: Candidates, row: int, inquiry: Inquiry) -> Option:
    """The candidate as a deployment, with intervals."""
    c = candidates
    decode = _part(*found.engine_at(int(c.decode[row])), int(c.decode_workers[row]))
    prefill = None
    if c.prefill[row] != NO_PREFILL:
        prefill = _part(*found.engine_at(int(c.prefill[row])), int(c.prefill_workers[row]))
    question = question_of(decode, prefill, float(c.concurrency[row]), inquiry.traffic)
    one = c.take(np.array([row]))
    gpus = int(one.gpu_count[0])
    tok_s = float(one.requests_per_s(inquiry.traffic)[0]) * inquiry.traffic.osl
    board_w = sum(p.setting.accelerator.board_w * p.workers * p.mapping.gpu_count for p in (decode, prefill) if p) * float(one.units[0])
    return Option(
        decode=decode,
        prefill=prefill,
        units=int(one.units[0]),
        batch=int(one.batch[0]),
        concurrency=float(one.concurrency[0]),
        gpu_count=gpus,
        idle_gpus=int(one.pool_gpus[0]) - gpus,
        power_kw=float(one.power_kw[0]),
        dollars_per_hour=float(one.dollars_per_hour[0]),
        estimate=estimate(calibration, question),
        requests_per_s=tok_s / inquiry.traffic.osl,
        tok_s_per_gpu=tok_s / gpus,
        tok_s_per_mw=tok_s / float(one.power_kw[0]) * 1e3,
        dollars_per_mtok=float(one.dollars_per_hour[0]) / 3600 / tok_s * 1e6,
        joule_per_token=float(one.power_kw[0]) * 1e3 / tok_s,
        board_joule_per_token=board_w / tok_s,
    )


def question_of(decode: Part, prefill: Part | None, concurrency: float, traffic: Traffic) -> Question:
    return Question(
        setting=decode.setting,
        mapping=decode.mapping,
        worker_count=decode.workers,
        prefill_mapping=prefill.mapping if prefill else None,
        prefill_worker_count=prefill.workers if prefill else 0,
        prefill_setting=prefill.setting if prefill else None,
        concurrency=concurrency,
        traffic=traffic,
    )


def _part(engines: Engines, row: int, workers: int) -> Part:
    m = engines.mappings
    mapping = ParallelMapping(*(int(column[row]) for column in (m.tp, m.pp, m.dp, m.moe_tp, m.moe_ep)))
    return Part(engines.setting, mapping, workers)


def _spread(frontier: Candidates, traffic: Traffic, most: int = 60) -> list[int]:
    """Rows of the frontier: all, or evenly many over it, the ends among them."""
    if len(frontier) <= most:
        return list(range(len(frontier)))
    return [int(row) for row in np.unique(np.linspace(0, len(frontier) - 1, most).astype(int))]


def _of_different_kinds(ranked: Sequence[Option], top: int) -> list[Option]:
    """The best of each (serving, engine, precision, accelerators, layout), so that five rows are not one deployment at five batches."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for option in ranked:
        kind = (option.decode, option.prefill, option.units)
        if kind not in seen:
            seen.add(kind)
            kept.append(option)
    return kept[:top]


def _shortfall(calibration: Calibration, found: Found, inquiry: Inquiry) -> Shortfall:
    assert found.nearest is not None
    option = option_at(calibration, found, found.nearest, 0, inquiry)
    excess = found.nearest.excess(inquiry.goal, inquiry.traffic)
    bound = max(excess, key=lambda name: float(excess[name][0]))
    wanted = float(getattr(inquiry.goal, bound))
    factor = float(excess[bound][0])
    return Shortfall(option, bound, wanted, wanted / factor if bound == "tok_s_per_user" else wanted * factor)


def reasons(option: Option, advice: Advice) -> list[str]:
    """Why this one, in sentences: what it gives, what limits it, what the figures rest on."""
    goal, traffic, e = advice.inquiry.goal, advice.inquiry.traffic, option.estimate
    said = [f"{option.tok_s_per_gpu:.0f} tokens/s per accelerator at {e.tok_s_per_user:.0f} tokens/s per user"]
    bounds = {
        "TTFT": (e.ttft_ms.value, goal.ttft_ms),
        "ITL": (e.itl_ms.value, goal.longest_itl_ms),
        "latency": (e.ttft_ms.value + e.itl_ms.value * (traffic.osl - 1), goal.latency_ms),
    }
    near = [name for name, (value, bound) in bounds.items() if bound and value > 0.85 * bound]
    said.append(
        f"a larger batch would break the bound on {' and '.join(near)}" if near else "the batch is what memory or throughput allows"
    )
    other = next((o for o in advice.frontier if o.is_disaggregated != option.is_disaggregated), None)
    if other:
        best_other = max((o.tok_s_per_gpu for o in advice.frontier if o.is_disaggregated != option.is_disaggregated), default=0.0)
        word = "aggregated" if option.is_disaggregated else "disaggregated"
        said.append(f"{option.tok_s_per_gpu / best_other:.2f} times the best {word} one on the frontier")
    if option.idle_gpus:
        said.append(f"{option.idle_gpus} of {option.idle_gpus + option.gpu_count} accelerators stay idle")
    if e.basis is not Basis.PAIR:
        said.append(f"{e.basis.value}: take the interval seriously")
    risky = e.ttft_ms.high > goal.ttft_ms if goal.ttft_ms else False
    if risky or (goal.itl_ms is not None and e.itl_ms.high > goal.itl_ms):
        said.append("within the interval it may miss the goal; measure before you buy")
    return said
