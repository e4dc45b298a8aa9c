"""Stands for `trtllm-serve` as a process: `python -m tests.unit.trtllm.player MODEL FLAGS…`. Strict about flags and the options file.

What context servers leave for generation servers lies in the folder PLAYER_CONTEXTS.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from pathlib import Path

from tests.unit.trtllm.double import TrtllmDouble, serving

_OPTIONS = {"enable_iter_perf_stats", "guided_decoding_backend", "kv_cache_config", "dtype", "cache_transceiver_config"}
_OPTIONS |= {"disable_overlap_scheduler"}
_PARTS = {"enable_block_reuse", "event_buffer_max_size", "tokens_per_block", "max_tokens", "backend"}


class ContextFolder:
    """Implements `Contexts` for processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, state: str, prompt: list[int]) -> None:
        self._place(state).write_text(json.dumps(prompt))

    def take(self, state: str) -> list[int] | None:
        try:
            found: list[int] = json.loads(self._place(state).read_text())
        except OSError:
            return None
        self._place(state).unlink()
        return found

    def _place(self, state: str) -> Path:
        return self._folder / hashlib.sha256(state.encode()).hexdigest()


def read_options(text: str) -> dict[str, str]:
    """By dotted name. Raises: SystemExit for what `LlmArgs` would not know."""
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        name, _, value = line.strip().partition(":")
        is_part = line.startswith("  ")
        if name not in (_PARTS if is_part else _OPTIONS):
            raise SystemExit(f"ValueError: Extra inputs are not permitted: {name}")
        section = section if is_part else name
        found[f"{section}.{name}" if is_part else name] = value.strip()
    return found


async def play(port: int, model: str, options: dict[str, str]) -> None:
    contexts = ContextFolder(Path(os.environ["PLAYER_CONTEXTS"])) if "cache_transceiver_config" in options else None
    pause_s = float(os.environ.get("PLAYER_PAUSE_S", "0"))
    block_size = int(options.get("kv_cache_config.tokens_per_block", "32"))
    async with serving(TrtllmDouble(block_size=block_size, pause_s=pause_s, model=model, contexts=contexts), port):
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", choices=["pytorch"], required=True)
    parser.add_argument("--extra_llm_api_options", type=Path, required=True)
    for flag in ("--max_batch_size", "--max_num_tokens", "--max_seq_len"):
        parser.add_argument(flag, type=int)
    given = parser.parse_args()
    print("[TensorRT-LLM] TensorRT LLM version: 1.3.0", flush=True)
    options = read_options(given.extra_llm_api_options.read_text())
    asyncio.run(play(given.port, given.model, options))


if __name__ == "__main__":
    main()
