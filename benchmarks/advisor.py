"""The advisor: errors on measurements held out, and speed.

DATA: a table with the columns of AIConfigurator's silicon data; without it only speed is measured, and errors come from the provenance
of the coefficients that are shipped. Cross-validation by whole configurations; pairs: all of a model on an accelerator held out.

Times: CPU of this process for the sweep and the estimate, medians; wall for the command. Sweep: DeepSeek-V3 on one GB200 NVL72, all
engines, fp8 and nvfp4, aggregated and disaggregated.

Peer: AIConfigurator 0.12.0 (`--peer PYTHON`: the interpreter of an environment that has it; 851 MB). Its time: on Qwen3-32B, 32 H200,
aggregated and disaggregated. With DATA also its errors: on aggregated rows drawn on a seed, where it answers, beside ours on the same,
whole configurations held out. It has tables of operators of newer engines, and has seen no serving point; its databases stay loaded from
one question to the next. Without it no peer is shown; what was measured before is in docs/advisor.md.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from math import expm1, log
from pathlib import Path
from subprocess import PIPE

from harness import STDERR, Figure, arguments, report
from polyphase.advisor.advice import Inquiry, advise
from polyphase.advisor.calibrate import CrossValidation, cross_validated
from polyphase.advisor.catalog import shipped_calibration, shipped_library
from polyphase.advisor.deployment import Serving, Setting, Traffic
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.evaluation import Prediction
from polyphase.advisor.fleet import parse_fleet
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.measurements import read_measurements
from polyphase.advisor.operator_tables import arguments_of
from polyphase.advisor.precision import parse_precision
from polyphase.advisor.second_opinion import NoAnswer

LIBRARY = shipped_library()
PEER_ANSWERS = str(Path(__file__).with_name("peer_aiconfigurator.py"))
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


def cross_validation(data: Path) -> CrossValidation:
    with data.open(newline="") as stream:
        measurements = read_measurements(csv.DictReader(stream), LIBRARY).measurements
    return cross_validated(measurements, lambda what: STDERR.print(f"cross-validating: {what}", style="dim"))[1]


def beside_the_peer(predictions: Sequence[Prediction], python: str, count: int = 60) -> dict[str, Figure]:
    """Errors of both on the rows of a seeded draw that the peer answers."""
    drawn = [p for p in predictions if p.measurement.setting.serving is Serving.AGGREGATED and not p.measurement.is_doubtful]
    random.Random(1).shuffle(drawn)
    hub_names = {name: hub for hub, name in reversed(LIBRARY.hub_names.items())}
    own: list[Prediction] = []
    theirs: list[tuple[float, float]] = []
    seconds: list[float] = []
    with subprocess.Popen([python, PEER_ANSWERS], stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        for number, prediction in enumerate(drawn[:count]):
            STDERR.print(f"asking AIConfigurator: {number + 1} of {count}", style="dim")
            m = prediction.measurement
            question = Question(m.setting, m.mapping, m.concurrency, Traffic(m.isl, m.osl), m.worker_count)
            try:
                asked = {"model_path": hub_names[m.setting.shape.name], **arguments_of(question)}
            except NoAnswer:
                continue
            peer.stdin.write(json.dumps(asked) + "\n")
            peer.stdin.flush()
            said = json.loads(next(line for line in peer.stdout if line.startswith("{")))
            seconds.append(said["seconds"])
            if said.get("itl"):
                own.append(prediction)
                theirs.append((log(said["itl"] / m.itl_ms), log(said["ttft"] / m.ttft_ms)))
        peer.stdin.close()

    def percent(errors: Iterable[float]) -> list[float]:
        return [100 * abs(expm1(error)) for error in errors]

    itl, ttft = percent(p.itl_error for p in own), percent(p.ttft_error for p in own)
    their_itl, their_ttft = percent(error for error, _ in theirs), percent(error for _, error in theirs)
    return {
        "same_rows": Figure(len(own), ""),
        "same_rows_itl_median_pct": Figure(statistics.median(itl), "%", peer=statistics.median(their_itl)),
        "same_rows_itl_p90_pct": Figure(statistics.quantiles(itl, n=10)[8], "%", peer=statistics.quantiles(their_itl, n=10)[8]),
        "same_rows_ttft_median_pct": Figure(statistics.median(ttft), "%", peer=statistics.median(their_ttft)),
        "same_rows_estimate_s": Figure(estimate_us() / 1e6, "s", peer=statistics.median(seconds)),
    }


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
    found = cross_validation(options.data) if options.data else None
    held_out = found.figures() if found else shipped_calibration().provenance["held_out_errors"]
    beside = beside_the_peer(found.configuration, options.peer) if found and options.peer else {}
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
            **beside,
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
