"""What the benchmark scripts share: figures, their JSON line and table, percentiles, and a streaming client that notes times."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field

import httpx
from rich.console import Console
from rich.table import Table

STDERR = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Figure:
    value: float
    unit: str
    target: str | None = None
    peer: float | None = None

    def as_json(self) -> dict[str, object]:
        return {"value": self.value, "unit": self.unit, "peer": self.peer, "target": self.target}


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def report(benchmark: str, figures: dict[str, Figure], *, as_json: bool) -> None:
    """A table on stderr for people; with `as_json`, the line that machines read on stdout."""
    table = Table("figure", "value", "unit", "peer", "target", title=benchmark)
    for name, figure in figures.items():
        table.add_row(name, f"{figure.value:.4g}", figure.unit, "" if figure.peer is None else f"{figure.peer:.4g}", figure.target or "")
    STDERR.print(table)
    if as_json:
        sys.stdout.write(json.dumps({"benchmark": benchmark, "figures": {n: f.as_json() for n, f in figures.items()}}) + "\n")


def percentile(values: list[float], fraction: float) -> float:
    """Nearest-rank percentile; `fraction` in [0, 1]."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


@dataclass(slots=True)
class StreamTimes:
    """When a streamed answer's tokens arrived. One chunk may hold several tokens; each counts as arriving with its chunk."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    request_id: str = ""

    @property
    def ttft_ms(self) -> float:
        return (self.token_s[0] - self.sent_s) * 1e3

    @property
    def itl_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


async def stream_completion(
    client: httpx.AsyncClient, prompt: list[int], max_tokens: int, model: str = "demo", times: StreamTimes | None = None
) -> StreamTimes:
    """One greedy streamed completion of exactly `max_tokens` tokens.

    Args:
        times: filled while the stream runs, for whoever wants to look meanwhile.

    Raises: RuntimeError if it ends in an error.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    times = times or StreamTimes(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:500]!r}")
        times.request_id = response.headers.get("x-request-id", "")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now_s = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"in the stream: {chunk['error']}")
            for choice in chunk["choices"]:
                token_ids = choice.get("token_ids") or []
                times.token_ids += token_ids
                times.token_s += [now_s] * len(token_ids)
                times.finish_reason = choice["finish_reason"] or times.finish_reason
    if times.finish_reason is None:
        raise RuntimeError("the stream ended without a finish reason")
    return times
