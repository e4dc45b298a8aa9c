"""Stock vLLM behind Polyphase: `vllm serve` is launched, or a running server attached to; nothing in it is changed or imported.

`flags` writes its command line, `dialects` its requests, `metrics` and `kv_events` watch it, `translation` makes its KV events ours.
"""

from polyphase.engines.vllm.settings import VllmSettings

__all__ = ["VllmSettings"]
