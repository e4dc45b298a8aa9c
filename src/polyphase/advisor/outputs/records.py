"""Deployments as flat records, for CSV, JSON and the page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

from polyphase.advisor.advice import Advice, Option, Part


def record_of(option: Option) -> dict[str, Any]:
    """Units last in the names; `_low` and `_high` bound 80 of 100 cases."""
    e = option.estimate
    record: dict[str, Any] = {
        "serving": option.decode.setting.serving.value,
        "layout": option.layout,
        "backend": option.decode.setting.backend,
        "precision": option.decode.setting.precision.name,
        "units": option.units,
        "batch_per_rank": option.batch,
        "concurrency": round(option.concurrency * option.units),
        "gpus": option.gpu_count,
        "idle_gpus": option.idle_gpus,
        "requests_per_s": _short(option.requests_per_s),
        "tok_s_per_user": _short(e.tok_s_per_user),
        "tok_s_per_gpu": _short(option.tok_s_per_gpu),
        "tok_s_per_gpu_low": _short(option.tok_s_per_gpu * e.tok_s.low / e.tok_s.value),
        "tok_s_per_gpu_high": _short(option.tok_s_per_gpu * e.tok_s.high / e.tok_s.value),
        "tok_s_per_mw": _short(option.tok_s_per_mw),
        "dollars_per_mtok": _short(option.dollars_per_mtok),
        "joule_per_token": _short(option.joule_per_token),
        "board_joule_per_token": _short(option.board_joule_per_token),
        "power_kw": _short(option.power_kw),
        "dollars_per_hour": _short(option.dollars_per_hour),
    }
    for name in ("ttft_ms", "itl_ms"):
        figure = getattr(e, name)
        record |= {name: _short(figure.value), f"{name}_low": _short(figure.low), f"{name}_high": _short(figure.high)}
    record |= {"basis": e.basis.value, "version": e.version}
    record |= _part_record("decode", option.decode)
    record |= _part_record("prefill", option.prefill) if option.prefill else {}
    return record


def _part_record(name: str, part: Part) -> dict[str, Any]:
    m = part.mapping
    return {
        f"{name}_accelerator": part.setting.accelerator.name,
        f"{name}_workers": part.workers,
        f"{name}_tp": m.tp,
        f"{name}_pp": m.pp,
        f"{name}_dp": m.dp,
        f"{name}_moe_tp": m.moe_tp,
        f"{name}_moe_ep": m.moe_ep,
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def advice_record(advice: Advice) -> dict[str, Any]:
    """All of an answer, for `--json`."""
    q = advice.inquiry
    answer: dict[str, Any] = {
        "model": q.shape.name,
        "fleet": str(q.fleet),
        "isl": q.traffic.isl,
        "osl": q.traffic.osl,
        "cached_tokens": q.traffic.cached_tokens,
        "evaluated": advice.evaluated,
        "meeting_the_goal": advice.fitting,
        "best": [record_of(option) for option in advice.best],
        "frontier": [record_of(option) for option in advice.frontier],
        "shortfall": None,
    }
    if (short := advice.shortfall) is not None:
        answer["shortfall"] = {
            "bound": short.bound,
            "wanted": _short(short.wanted),
            "reached": _short(short.reached),
            "factor": _short(short.factor),
            "nearest": record_of(short.option),
        }
    return answer


def as_json(advice: Advice) -> str:
    return json.dumps(advice_record(advice), indent=2) + "\n"


def as_csv(options: Sequence[Option]) -> str:
    """One line per deployment; columns that only disaggregated ones have are blank elsewhere."""
    records = [record_of(option) for option in options]
    columns = list(dict.fromkeys(column for record in records for column in record))
    text = _Lines()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return "".join(text.lines)


class _Lines:
    """All that a csv writer needs of a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> int:
        self.lines.append(line)
        return len(line)
