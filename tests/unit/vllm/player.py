"""Stands for `vllm serve` as a process: `python -m tests.unit.vllm.player MODEL FLAGS…`. Plays the recordings, slowly, with KV events."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

from tests.unit.vllm.double import EventsDouble, Recording, VllmDouble


async def play(port: int, events_folder: Path, pause_s: float) -> None:
    recording = Recording()
    recording.pages["/kv_event_sources"]["0"] |= {
        "endpoint": f"ipc://{events_folder}/events",
        "replay_endpoint": f"ipc://{events_folder}/replay",
    }
    double = VllmDouble(recording, pause_s=pause_s)
    async with EventsDouble(events_folder, recording.batches[:3]):
        server = await asyncio.start_server(double.serve, "127.0.0.1", port)
        async with server:
            await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-events-config", type=json.loads, required=True)
    parser.add_argument("--kv-transfer-config", type=json.loads)
    for flag in ("--served-model-name", "--host", "--max-num-seqs", "--scheduling-policy"):
        parser.add_argument(flag, required=True)
    for flag in ("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float)
    if "PLAYER_IS_NEW" in os.environ:  # else a version that does not know these, and says so as argparse does
        parser.add_argument("--enable-scale-out", action="store_true")
        parser.add_argument("--kv-cache-memory-bytes", type=int)
    given = parser.parse_args()
    folder = Path(given.kv_events_config["endpoint"].removeprefix("ipc://")).parent
    print("Starting vLLM server", flush=True)
    asyncio.run(play(given.port, folder, float(os.environ.get("PLAYER_PAUSE_S", "0"))))


if __name__ == "__main__":
    main()
