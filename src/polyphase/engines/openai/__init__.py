"""Any server that speaks OpenAI's API: llama.cpp's, Ollama, TGI, LM Studio, cloud endpoints, another Polyphase. Attached to, never started.

What it can is asked of it (`probe`), not assumed. If it takes token ids and tells them, and the tokenizer's files are here, it is a worker
like any other; else text goes there as text, and the frontend passes bodies through.
"""

from polyphase.engines.openai.settings import OpenAISettings

__all__ = ["OpenAISettings"]
