"""How long one waits: for `polyphase --help`, for `polyphase serve` on the demo model; and what a frontend weighs in memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from harness import STDERR, Figure, arguments, report
from polyphase.testing import Deployment


def help_s() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "polyphase", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def rss_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def frontend_pid(served: Deployment) -> int:
    def is_frontend(pid: int) -> bool:
        return b"polyphase.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes()

    return next(pid for pid in served.pids() if is_frontend(pid))


def serve_once(requests: int) -> tuple[float, float, float]:
    """Seconds to readiness; resident megabytes of the frontend when ready and after some requests."""
    with Deployment("demo") as served:
        pid = frontend_pid(served)
        idle_mb = rss_mb(pid)
        for i in range(requests):
            body = {"model": "demo", "prompt": f"{i} What does os.path.join do?", "max_tokens": 8}
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).raise_for_status()
        return served.ready_s, idle_mb, rss_mb(pid)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with STDERR.status("polyphase --help"):
        help_times = [help_s() for _ in range(options.rounds + 1)][1:]
    starts = []
    for turn in range(options.rounds):
        with STDERR.status(f"polyphase serve demo, {turn + 1} of {options.rounds}"):
            starts.append(serve_once(requests=100))
    figures = {
        "frontend_rss_mb": Figure(max(used for _, _, used in starts), "MB", "<= 150"),
        "frontend_idle_rss_mb": Figure(max(idle for _, idle, _ in starts), "MB"),
        "ready_s": Figure(statistics.median(ready for ready, _, _ in starts), "s", "<= 10"),
        "help_s": Figure(statistics.median(help_times), "s", "<= 1"),
    }
    report("startup", figures, as_json=options.json)


if __name__ == "__main__":
    main()
