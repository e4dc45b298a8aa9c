"""The advisor: errors on measurements held out, and speed.

DATA: a table with the columns of AIConfigurator's silicon data; without it only speed is measured, and errors come from the provenance
of the coefficients that are shipped. Cross-validation by whole configurations; pairs: all of a model on an accelerator held out.

Times: CPU of this process for the sweep and the estimate, medians; wall for the command. Sweep: DeepSeek-V3 on one GB200 NVL72, all
engines, fp8 and nvfp4, aggregated and disaggregated.

Peer: AIConfigurator 0.12.0 (`--peer PYTHON`: the interpreter of an environment that has it; 851 MB) on Qwen3-32B, 32 H200, aggregated
and disaggregated. Without it no peer is shown; what was measured before is in docs/advisor.md.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import STDERR, Figure, arguments, report
from polyphase.advisor.advice import Inquiry, advise
from polyphase.advisor.calibrate import cross_validated
from polyphase.advisor.deployment import Setting, Traffic
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.fleet import parse_fleet
from polyphase.advisor.library import shipped_calibration, shipped_library
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.measurements import read_measurements
from polyphase.advisor.precision import parse_precision

LIBRARY = shipped_library()
COMMAND = [
    "-m",
    "polyphase",
    "advise",
    "llama-3.1-70b",
    "--fleet",
    "16xh200",
    "--isl",
    "4000",
    "--osl",
    "500",
    "--ttft",
    "1s",
    "--itl",
    "20ms",
]
# One question to both: Qwen3-32B in 16 bits with TensorRT-LLM on 32 H200.
PEER = [
    "cli", "default", "--model-path", "Qwen/Qwen3-32B", "--total-gpus", "32", "--system", "h200_sxm", "--backend", "trtllm",
    "--isl", "4000", "--osl", "500", "--ttft", "1000", "--tpot", "20", "--no-color",
]  # fmt: skip
SAME = [
    "-m", "polyphase", "advise", "qwen3-32b", "--fleet", "32xh200", "--backend", "trtllm", "--precision", "bf16",
    "--isl", "4000", "--osl", "500", "--ttft", "1s", "--itl", "20ms",
]  # fmt: skip


def held_out_errors(data: Path | None) -> dict[str, dict[str, float]]:
    if data is None:
        figures: dict[str, dict[str, float]] = shipped_calibration().provenance["held_out_errors"]
        return figures
    with data.open(newline="") as stream:
        measurements = read_measurements(csv.DictReader(stream), LIBRARY).measurements
    return cross_validated(measurements, lambda what: STDERR.print(f"cross-validating: {what}", style="dim"))[1].figures()


def sweep() -> tuple[float, float]:
    """Median CPU seconds of five, and deployments evaluated a second. Engines' curves, candidates, frontier and intervals are in it."""
    fleet = parse_fleet("72xgb200", LIBRARY)
    inquiry = Inquiry(LIBRARY.model("deepseek-v3"), fleet, Traffic(4000, 1000), precisions=("fp8_block", "nvfp4"))
    seconds, evaluated = [], 0
    for _ in range(5):
        began = time.process_time()
        evaluated = advise(shipped_calibration(), inquiry).evaluated
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), evaluated / statistics.median(seconds)


def estimate_us() -> float:
    """Of mappings and loads that were not asked about before."""
    setting = Setting(LIBRARY.model("deepseek-v3"), LIBRARY.accelerator("h200"), parse_precision("fp8_block"), "sglang")
    calibration = shipped_calibration()

    def ask(number: int) -> None:
        mapping = ParallelMapping(8, 1, 1, 8, 1) if number % 2 else ParallelMapping(1, 1, 16, 1, 16)
        estimate(calibration, Question(setting, mapping, 16 + number, Traffic(1000 + number, 500 + number)))

    return _median_us(ask)


def _median_us(ask: Callable[[int], None], count: int = 300) -> float:
    times = []
    for number in range(count):
        began = time.thread_time_ns()
        ask(number)
        times.append((time.thread_time_ns() - began) / 1e3)
    return statistics.median(times)


def wall_s(command: list[str], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="table to cross-validate on: two minutes of CPU")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with aiconfigurator")
    options = parser.parse_args()
    held_out = held_out_errors(options.data)
    cv, pair = held_out["configuration"], held_out["pair"]
    sweep_s, points_per_s = sweep()
    peer_s = wall_s([str(Path(options.peer).with_name("aiconfigurator")), *PEER], runs=1) if options.peer else None
    report(
        "advisor",
        {
            "cv_itl_median_pct": Figure(cv["itl_median_pct"], "%", "<= 10"),
            "cv_itl_p90_pct": Figure(cv["itl_p90_pct"], "%", "<= 30"),
            "cv_tput_median_pct": Figure(cv["tput_median_pct"], "%", "<= 10"),
            "cv_ttft_median_pct": Figure(cv["ttft_median_pct"], "%", "<= 25"),
            "pair_itl_median_pct": Figure(pair["itl_median_pct"], "%", "<= 18"),
            "interval80_coverage_pct": Figure(cv["interval80_coverage_pct"], "%", "75 to 85"),
            "sweep_s": Figure(sweep_s, "s", "<= 2"),
            "points_per_s": Figure(points_per_s, "1/s", ">= 1e6"),
            "estimate_us": Figure(estimate_us(), "us", "<= 1000"),
            "cli_s": Figure(wall_s([sys.executable, *COMMAND]), "s", "<= 3"),
            "qwen3_32b_s": Figure(wall_s([sys.executable, *SAME]), "s", peer=peer_s),
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
