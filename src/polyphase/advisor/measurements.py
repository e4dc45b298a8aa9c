"""Rows of a table of measured serving points, with the columns of AIConfigurator's silicon data, to what the model is fitted on and
judged by.

A row that cannot be used is counted under its reason, never dropped in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from polyphase.advisor.catalog import Library
from polyphase.advisor.deployment import Serving, Setting
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.precision import Precision, weight_format
from polyphase.core.errors import ConfigurationError

OVERLOADED_TTFT_MS = 10_000.0
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")
# By name, or by how releases of the table name their dumps of its database.
_INFERENCEX = re.compile(r"InferenceX|^db-dump/|^source_file=\d{4}-\d\d-\d\d\.csv")
_ENGINES = {"trt": "trtllm", "sglang": "sglang", "vllm": "vllm"}  # also under another's name, as in dynamo-trt
_ONE_NODE = 8  # InferenceX's aggregated runs; larger ones are disaggregated deployments with their accelerators added up, TP 72 for example
_LAYOUT = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
REQUIRED_COLUMNS = ("backend", "model_path", "system", "mode", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms")


class _Unusable(Exception):
    """Why a row cannot be used; the reason is the whole message."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """`mapping` and `batch` (sequences per data parallel rank) are of the engine that decodes."""

    setting: Setting
    mapping: ParallelMapping
    worker_count: int
    prefill_mapping: ParallelMapping
    prefill_worker_count: int  # 0: the same engine prefills
    batch: float
    concurrency: float
    isl: int
    osl: int
    ttft_ms: float
    itl_ms: float
    gpu_count: int
    is_doubtful: bool = False  # not what it is labelled as, or with a balancer's times in it: judged, not learned from

    @property
    def out_tok_s_per_gpu(self) -> float:
        return throughput(self.concurrency, self.osl, self.ttft_ms, self.itl_ms) / self.gpu_count

    @property
    def waiting(self) -> float:
        """Requests in the deployment for each rank that prefills."""
        ranks = self.prefill_worker_count * self.prefill_mapping.dp if self.prefill_worker_count else self.mapping.dp * self.worker_count
        return self.concurrency / ranks

    @property
    def deployment(self) -> tuple[object, ...]:
        """Equal for rows that differ in nothing but load and sequence lengths."""
        s = self.setting
        names = (s.model_key, s.accelerator.name, s.backend, s.version, s.serving, s.precision.name)
        return (*names, self.mapping, self.worker_count, self.prefill_mapping, self.prefill_worker_count)

    @property
    def configuration(self) -> tuple[object, ...]:
        """Equal for rows that differ in nothing but load."""
        return (*self.deployment, self.isl, self.osl)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for one measurement under several ids: tables repeat them, with other versions and names."""
        s = self.setting
        return (s.model_key, s.accelerator.name, s.backend, self.isl, self.osl, round(self.ttft_ms, 3), round(self.itl_ms, 4))


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    measurements: list[Measurement]
    skipped: Counter[str] = field(default_factory=Counter)


def throughput(concurrency: float, osl: float, ttft_ms: float, itl_ms: float) -> float:
    """Output tokens per second of a deployment that always holds `concurrency` requests."""
    return concurrency * osl / ((ttft_ms + itl_ms * (osl - 1)) / 1e3)


def read_measurements(rows: Iterable[Mapping[str, str | None]], library: Library) -> MeasuredTable:
    """Raises: ConfigurationError if a required column is missing from the first row."""
    table = MeasuredTable([])
    for number, row in enumerate(rows):
        if number == 0 and (missing := [column for column in REQUIRED_COLUMNS if column not in row]):
            raise ConfigurationError(f"the table lacks the columns {', '.join(missing)}; it must have those of silicon_measured.csv")
        try:
            table.measurements.append(_measurement(row, library))
        except _Unusable as reason:
            table.skipped[str(reason)] += 1
    return table


def _measurement(row: Mapping[str, str | None], library: Library) -> Measurement:
    ttft_ms, itl_ms = _positive(row, "silicon_ttft_ms"), _positive(row, "silicon_tpot_ms")
    isl, osl = int(_positive(row, "isl")), int(_positive(row, "osl"))
    serving = _serving(row)
    setting = _setting(row, library, serving)
    if serving is Serving.AGGREGATED:
        reported = _layout(row, "")
        mapping = _as_run(reported, row)
        concurrency = _concurrency(row) or _count(row, "batch_size") * reported.dp
        workers, prefill, prefill_workers = _replicas(row, concurrency, reported), mapping, 0
        gpu_count = workers * reported.gpu_count
    else:
        workers, prefill_workers = _optional(row, "decode_num_workers"), _optional(row, "prefill_num_workers")
        if not workers or not prefill_workers:
            raise _Unusable("disaggregated without worker counts")
        mapping, prefill = _layout(row, "decode_"), _layout(row, "prefill_")
        gpu_count = workers * mapping.gpu_count + prefill_workers * prefill.gpu_count
        concurrency = _concurrency(row) or _count(row, "decode_batch_size") * workers * mapping.dp
    if ttft_ms > OVERLOADED_TTFT_MS:
        raise _Unusable(f"overloaded: TTFT over {OVERLOADED_TTFT_MS / 1e3:.0f} s")
    return Measurement(
        setting,
        _fitting(mapping, setting),
        workers,
        _fitting(prefill, setting),
        prefill_workers,
        concurrency / (mapping.dp * workers),
        concurrency,
        isl,
        osl,
        ttft_ms,
        itl_ms,
        gpu_count,
        is_doubtful=serving is Serving.AGGREGATED and (workers > 1 or (_is_inferencex(row) and mapping.gpu_count > _ONE_NODE)),
    )


def _serving(row: Mapping[str, str | None]) -> Serving:
    mode = _text(row, "mode").lower()
    if mode not in ("agg", "disagg"):
        raise _Unusable(f"mode {mode!r} is neither agg nor disagg")
    return Serving(mode)


def _setting(row: Mapping[str, str | None], library: Library, serving: Serving) -> Setting:
    model, system, backend = _text(row, "model_path"), _text(row, "system"), _text(row, "backend").lower()
    if not backend:
        raise _Unusable("no backend")
    backend = next((known for mark, known in _ENGINES.items() if mark in backend), backend)
    try:
        shape = library.model(model)
    except ConfigurationError:
        raise _Unusable(f"unknown model {model}") from None
    try:
        accelerator = library.accelerator(system)
    except ConfigurationError:
        raise _Unusable(f"unknown accelerator {system}") from None
    precision = _precision(row, model, shape.native_precision)
    return Setting(shape, accelerator, precision, backend, _text(row, "backend_version"), serving)


def _precision(row: Mapping[str, str | None], model: str, native: str) -> Precision:
    """From the formats' columns; else the precision; else the model's name; else 16 bits. gpt-oss keeps its own: only experts are in 4
    bits.
    """
    by_name = next((name for mark, name in (("nvfp4", "nvfp4"), ("fp8", "fp8")) if mark in model.lower()), "bf16")
    name = _text(row, "gemm_quant_mode") or _text(row, "precision") or by_name
    try:
        gemm = weight_format(name)
        experts = weight_format(_text(row, "moe_quant_mode") or name)
        if "+" in native:
            gemm, experts = (weight_format(part) for part in native.split("+"))
    except ConfigurationError:
        raise _Unusable(f"unknown precision {name}") from None
    return Precision(gemm, experts, 1.0 if gemm.bytes_per_weight < 2 else 2.0)


def _layout(row: Mapping[str, str | None], prefix: str) -> ParallelMapping:
    return ParallelMapping(*(max(1, _optional(row, prefix + name)) for name in _LAYOUT))


def _as_run(reported: ParallelMapping, row: Mapping[str, str | None]) -> ParallelMapping:
    """InferenceX measures `tp`, `ep` and whether attention is data parallel; its rows come with them multiplied: TP 4 with EP 4, on four
    accelerators, as 16 = 4 · 4. The ids tell (`…_tp4_ep4_…`), and the same measurement is there in both forms. Aggregated rows of more
    than a node are disaggregated wide-EP deployments, their accelerators added up.
    """
    if not _is_inferencex(row):
        return reported
    tp, pp, dp, moe_tp, moe_ep = reported.tp, reported.pp, reported.dp, reported.moe_tp, reported.moe_ep
    if moe_tp == moe_ep > 1 and tp * dp == moe_tp * moe_ep:
        return ParallelMapping(moe_ep, pp, 1, 1, moe_ep) if dp == 1 else ParallelMapping(1, pp, moe_ep, 1, moe_ep)
    if tp == dp > 1 and moe_ep == tp * dp:
        return ParallelMapping(1, pp, dp, 1, dp)
    if reported.gpu_count > _ONE_NODE:
        return ParallelMapping(1, pp, tp * dp, 1, tp * dp)
    return reported


def _replicas(row: Mapping[str, str | None], concurrency: float, mapping: ParallelMapping) -> int:
    """Engines behind one address: `batch_size` is of a rank, so a whole multiple in flight is shared by as many. InferenceX has one."""
    if _is_inferencex(row):
        return 1
    each = (_number(row, "batch_size") or 0.0) * mapping.dp
    share = concurrency / each if each else 1.0
    return int(share) if share > 1 and share == int(share) else 1


def _is_inferencex(row: Mapping[str, str | None]) -> bool:
    return _INFERENCEX.search(_text(row, "silicon_data_source")) is not None


def _fitting(mapping: ParallelMapping, setting: Setting) -> ParallelMapping:
    """Experts spread over what attention is spread over, also where the columns are blank."""
    world = mapping.tp * mapping.dp
    if not setting.shape.experts:
        return ParallelMapping(mapping.tp, mapping.pp, mapping.dp, 1, 1)
    if mapping.moe_tp * mapping.moe_ep == world:
        return mapping
    return ParallelMapping(mapping.tp, mapping.pp, mapping.dp, world, 1)


def _text(row: Mapping[str, str | None], column: str) -> str:
    return (row.get(column) or "").strip()


def _number(row: Mapping[str, str | None], column: str) -> float | None:
    text = _text(row, column)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise _Unusable(f"{column} is no number") from None
    if not 0 <= value < float("inf"):
        raise _Unusable(f"{column} is out of range")
    return value


def _optional(row: Mapping[str, str | None], column: str) -> int:
    return int(_number(row, column) or 0)


def _positive(row: Mapping[str, str | None], column: str) -> float:
    value = _number(row, column)
    if not value:
        raise _Unusable(f"{column} is blank or 0")
    return value


def _count(row: Mapping[str, str | None], column: str) -> float:
    return max(1.0, _number(row, column) or 0.0)


def _concurrency(row: Mapping[str, str | None]) -> float | None:
    found = _CONCURRENCY.search(_text(row, "silicon_data_source"))
    return float(found[1]) if found and int(found[1]) else None
