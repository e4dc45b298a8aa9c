"""How many KV blocks an engine gets, and how long a context they allow."""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.core.errors import ConfigurationError

_DEFAULT_CONTEXTS = 16  # whole contexts that the cache holds unless memory is short
_HOST_LIMIT_BYTES = 1 << 30
_HOST_SHARE = 0.2  # of the available memory: there may be other workers on this machine
_DEVICE_SHARE = 0.85  # of the free memory: the rest is for activations
_FALLBACK_HOST_BYTES = 256 << 20  # where the system does not say how much memory there is


@dataclass(frozen=True, slots=True)
class CacheSize:
    block_count: int
    context_length: int  # tokens


def size_cache(
    *,
    block_size: int,
    block_bytes: int,
    kv_bytes: int | None,
    is_device: bool,
    available_bytes: int | None,
    model_context_length: int | None,
    wanted_context_length: int | None,
) -> CacheSize:
    """Raises: ConfigurationError if the wanted context is longer than the model's, or does not fit the KV bytes."""
    if wanted_context_length is not None and model_context_length is not None and wanted_context_length > model_context_length:
        raise ConfigurationError(f"a context of {wanted_context_length} tokens was asked for; the model's is {model_context_length}")
    context_length = wanted_context_length or model_context_length
    if context_length is None:
        raise ConfigurationError("the model's configuration does not say how long its context is; choose a context length")
    per_context = -(-context_length // block_size)
    limit = kv_bytes
    if limit is None:
        limit = _default_bytes(is_device, available_bytes)
        if not is_device:
            limit = min(limit, per_context * block_bytes * _DEFAULT_CONTEXTS)
    block_count = limit // block_bytes
    if block_count * block_size < 2:
        raise ConfigurationError(f"{limit} KV bytes do not hold a single block of {block_bytes} bytes; choose more")
    if per_context > block_count:
        if wanted_context_length is not None:
            raise ConfigurationError(
                f"a context of {wanted_context_length} tokens needs {per_context * block_bytes:,} KV bytes, but there are {limit:,}; "
                "choose more KV bytes or a shorter context"
            )
        context_length = block_count * block_size
    return CacheSize(block_count, context_length)


def _default_bytes(is_device: bool, available_bytes: int | None) -> int:
    if is_device:
        return int((available_bytes or 0) * _DEVICE_SHARE)
    if available_bytes is None:
        return _FALLBACK_HOST_BYTES
    return min(_HOST_LIMIT_BYTES, int(available_bytes * _HOST_SHARE))
