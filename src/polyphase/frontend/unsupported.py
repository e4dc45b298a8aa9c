"""Fields that OpenAI or vLLM know and this frontend does not honour yet.

Ignoring one would be a wrong answer with HTTP 200, so they are refused by name, unless their value asks for nothing.
"""

from __future__ import annotations

from typing import Any

_NOTHING: tuple[Any, ...] = (None, [], {}, False)

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (None, "none"),
    "functions": _NOTHING,
    "function_call": (None, "none"),
    "modalities": (None, [], ["text"]),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "moderation": _NOTHING,
    "verbosity": (None, "medium"),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "use_beam_search": _NOTHING,
    "length_penalty": (None, 1, 1.0),
    "early_stopping": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
    "logits_processors": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "bad_words": _NOTHING,
    "prompt_logprobs": _NOTHING,
    "prompt_embeds": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "spaces_between_special_tokens": (None, True),
    "return_tokens_as_token_ids": _NOTHING,
    "chat_template": _NOTHING,
    "documents": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "include_reasoning": (None, True),
    "thinking_token_budget": _NOTHING,
    "request_id": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "vllm_xargs": _NOTHING,
    "repetition_detection": _NOTHING,
    "echo": _NOTHING,
}


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of an unsupported field asks for nothing. `True == 1` in Python, so types are compared too."""
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL_VALUES[name])
