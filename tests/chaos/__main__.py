"""`python -m tests.chaos`: the long form. Its last line is a JSON object with `faults`, `requests`, `violations`; exit code 1
if there are any, or if the machine is too slow for all of it."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.chaos.run import Outcome, Scene, play

ROLES = ("--split-threshold", "64", "--max-batch-tokens", "128")  # small chunks, so that KV flows for prompts of 150 tokens
TORCH = ("--prefill", "1", "--decode", "2", "--kv-memory", "128MiB", *ROLES)
TORCH_WORKERS = ["prefill-0", "decode-0", "decode-1"]
SCENES = {
    "torch": Scene("torch", TORCH, TORCH_WORKERS, fault_count=90, request_count=300, mean_interval_s=0.4),
    "torch-tcp": Scene("torch-tcp", TORCH, TORCH_WORKERS, fault_count=90, request_count=300, mean_interval_s=0.4, over_tcp=True),
    "mock": Scene(
        "mock",
        ("--engine", "mock", "--prefill", "2", "--decode", "4", "--mock-speedup", "2", "--kv-memory", "192MiB", *ROLES),
        ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "decode-3"],
        fault_count=330,
        request_count=1500,
        client_count=16,
        case_count=72,  # more than 96 blocks a worker hold, so that prompts are computed, split and moved again
        has_slow_tokens=False,
        salts=False,  # the mock engine's tokens follow from the names of the prompt's blocks
        mean_interval_s=0.25,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scene", choices=list(SCENES), action="append", help="all unless told otherwise")
    arguments = parser.parse_args()
    total = Outcome()
    scenes = [SCENES[name] for name in arguments.scene or SCENES]
    with ThreadPoolExecutor(len(scenes)) as threads:  # side by side: much of a scene's time is spent waiting for workers to come back
        playing = [threads.submit(play, scene, arguments.seed, is_verbose=True) for scene in scenes]
        for scene, outcome in zip(scenes, (each.result() for each in playing), strict=True):
            sys.stderr.write(f"{scene.name}: {json.dumps(outcome.summary())}\n")
            total.add(outcome)
    sys.stdout.write(json.dumps({**total.summary(), "seed": arguments.seed}) + "\n")
    return 1 if total.violations or total.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
