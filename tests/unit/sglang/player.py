"""Stands for SGLang's server as a process: `python -m tests.unit.sglang.player FLAGS…`. Plays the recordings, slowly, with KV events."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

from tests.unit.sglang.double import CUMULATIVE, WHOLE, Recording, SglangDouble
from tests.unit.vllm.double import EventsDouble


async def play(port: int, events: dict[str, Any], name: str, pause_s: float) -> None:
    recording = Recording(name)
    recording.pages["/server_info"]["kv_events_config"] = json.dumps(events)
    double = SglangDouble(recording, pause_s=pause_s)
    async with EventsDouble(Path(events["endpoint"].removeprefix("ipc://")).parent, Recording().batches[:3]):
        server = await asyncio.start_server(double.serve, "127.0.0.1", port)
        async with server:
            await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-events-config", type=json.loads, required=True)
    for flag in ("--model-path", "--served-model-name", "--host", "--page-size", "--log-level-http"):
        parser.add_argument(flag, required=True)
    for flag in ("--enable-priority-scheduling", "--schedule-low-priority-values-first", "--disable-priority-preemption"):
        parser.add_argument(flag, action="store_true")
    is_new = "PLAYER_IS_NEW" in os.environ  # else a version that does not know it, and says so as argparse does
    if is_new:
        parser.add_argument("--incremental-streaming-output", action="store_true")
    given = parser.parse_args()
    print("server_args={}", flush=True)
    pause_s = float(os.environ.get("PLAYER_PAUSE_S", "0"))
    asyncio.run(play(given.port, given.kv_events_config, WHOLE if is_new else CUMULATIVE, pause_s))


if __name__ == "__main__":
    main()
