"""AIConfigurator asked the questions of benchmarks/advisor.py; run by an interpreter that has it (aiconfigurator 0.12.0).

In: JSON lines of `cli_estimate`'s arguments, on stdin. Out, on the line's turn: {"ttft", "itl", "seconds"} in ms and wall seconds, or
{"error", "seconds"}. Its databases stay loaded from one question to the next, as in a service.
"""

import json
import logging
import sys
import time

from aiconfigurator.cli.api import cli_estimate


def answer(question: dict) -> dict:
    began = time.perf_counter()
    try:
        found = cli_estimate(question.pop("model_path"), question.pop("system_name"), **question)
        return {"ttft": found.ttft, "itl": found.tpot, "seconds": time.perf_counter() - began}
    except Exception as error:  # noqa: BLE001  whatever it raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:200], "seconds": time.perf_counter() - began}


def main() -> None:
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
