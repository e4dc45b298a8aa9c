"""KV events of vLLM and SGLang in our words. Their hashes are opaque: the token ids that come with them are hashed as routers hash prompts.

    stored(hash, parent, tokens, extra keys) ──► named[hash] = (our sequence hash, namespace) ──► BlocksStored
    removed(hash)                            ──► named[hash]                                  ──► BlocksRemoved

Events come as maps or, of older versions, arrays; what makes equal tokens differ is in their `extra_keys` (vLLM) or `cache_salt` (SGLang).
A block may lie in several KV groups or physical blocks at once: it is held until the last of them is gone. What cannot be named is left
out, and its descendants with it: blocks whose parent is not known (history that was lost), blocks with media, and those of other than full
attention, which hold a window of the prefix and not the prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from polyphase.core.errors import WireError
from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.core.ids import SequenceHash
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Tier

EngineHash = int | bytes

_TIERS = {"gpu": Tier.DEVICE, "cpu": Tier.HOST, "storage": Tier.DISK, "disk": Tier.DISK, "cpu_pinned": Tier.HOST, "external": Tier.OBJECT}
_WHOLE_PREFIX = {None, "full_attention", "mla_attention", "sink_full_attention"}
# Source: the order of fields in vLLM's structs, which older versions send as arrays; SGLang's begins alike
_FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys", "group_idx",
        "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Batch:
    time_s: float  # when it was published, by the engine's clock
    events: list[dict[str, Any]]  # each with its `type`


def decode_batch(payload: bytes) -> Batch:
    """Either form. Raises: WireError."""
    try:
        time_s, events = msgspec.msgpack.decode(payload)[:2]
        return Batch(float(time_s), [_as_map(event) for event in events])
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise WireError(f"the engine sent a batch of KV events that cannot be understood: {error!r}") from error


def _as_map(event: Any) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    return {"type": event[0], **dict(zip(_FIELDS.get(event[0], ()), event[1:], strict=False))}


@dataclass(frozen=True, slots=True)
class _Name:
    sequence_hash: SequenceHash
    namespace: str | None


class Translator:
    """Owner of what one engine holds, by its own names."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._names: dict[EngineHash, _Name] = {}
        self._places: Counter[tuple[EngineHash, Tier, int]] = Counter()  # the last is the KV group
        self._held: Counter[tuple[SequenceHash, Tier]] = Counter()
        self._uses: Counter[EngineHash] = Counter()  # of a name, over tiers and groups
        self.unnamed_count = 0  # blocks that were left out

    def __len__(self) -> int:
        """Prefixes held, over all tiers."""
        return len(self._held)

    def translate(self, batch: Batch) -> list[KvEvent]:
        """Raises: WireError for an event of a known type with wrong contents; other types are passed over."""
        found: list[KvEvent] = []
        for event in batch.events:
            try:
                match event.get("type"):
                    case "BlockStored":
                        found += self._stored(event)
                    case "BlockRemoved":
                        found += self._removed(event)
                    case "AllBlocksCleared":
                        found += self.clear()
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise WireError(f"a KV event of the engine cannot be understood ({error!r}): {str(event)[:200]}") from error
        return found

    def clear(self) -> list[KvEvent]:
        """Nothing is held, or nothing is known of what is."""
        for counter in (self._places, self._held, self._uses):
            counter.clear()
        self._names.clear()
        return [AllCleared()]

    def move(self, hash_: EngineHash, source: Tier, target: Tier, group: int) -> list[KvEvent]:
        """A block went from one tier to another; for engines that tell it in one event."""
        if (hash_, source, group) not in self._places:
            return []  # one that was left out
        name = self._names[hash_]
        is_new = self._hold(hash_, name, target, group)
        _take_one(self._places, (hash_, source, group))
        _take_one(self._uses, hash_)
        is_gone = _take_one(self._held, (name.sequence_hash, source))
        stored: list[KvEvent] = [BlocksStored([int(name.sequence_hash)], target)] if is_new else []
        return [*stored, *([BlocksRemoved([int(name.sequence_hash)], source)] if is_gone else [])]

    def _stored(self, event: dict[str, Any]) -> list[KvEvent]:
        hashes: Sequence[EngineHash] = event["block_hashes"]
        token_ids = _token_ids(event["token_ids"])
        tier, group = _tier(event), event.get("group_idx") or 0
        is_whole = len(token_ids) == len(hashes) * self._block_size and event["block_size"] == self._block_size
        if not is_whole or event.get("kv_cache_spec_kind") not in _WHOLE_PREFIX or tier is None:
            self.unnamed_count += len(hashes)
            return []
        parent_hash = event["parent_block_hash"]
        parent = self._names.get(parent_hash) if parent_hash is not None else None
        if parent_hash is not None and parent is None:
            self.unnamed_count += len(hashes)
            return []
        keys = (event.get("extra_keys") or [None] * len(hashes))[: len(hashes)]
        lora = event.get("lora_name")
        namable = next((place for place, extra in enumerate(keys) if _has_media(extra)), len(hashes))
        self.unnamed_count += len(hashes) - namable
        namespace = (
            parent.namespace
            if parent is not None
            else namespace_of(event.get("cache_salt") or (_salt(keys[0], lora) if keys else None), lora)
        )
        ours = sequence_hashes(
            token_ids[: namable * self._block_size],
            self._block_size,
            namespace,
            parent.sequence_hash if parent is not None else None,
        )
        new = [name for hash_, name in zip(hashes, ours, strict=False) if self._hold(hash_, _Name(name, namespace), tier, group)]
        return [BlocksStored([int(name) for name in new], tier)] if new else []

    def _hold(self, hash_: EngineHash, name: _Name, tier: Tier, group: int) -> bool:
        """Whether the tier did not hold it before."""
        self._names[hash_] = name
        self._uses[hash_] += 1
        self._places[hash_, tier, group] += 1
        self._held[name.sequence_hash, tier] += 1
        return self._held[name.sequence_hash, tier] == 1

    def _removed(self, event: dict[str, Any]) -> list[KvEvent]:
        tier, group = _tier(event), event.get("group_idx") or 0
        gone: list[int] = []
        for hash_ in event["block_hashes"]:
            if tier is None or (hash_, tier, group) not in self._places:
                continue  # one that was left out
            name = self._names[hash_]
            _take_one(self._places, (hash_, tier, group))
            if _take_one(self._held, (name.sequence_hash, tier)):
                gone.append(int(name.sequence_hash))
            if _take_one(self._uses, hash_):
                del self._names[hash_]
        return [BlocksRemoved(gone, tier)] if gone and tier is not None else []


def _take_one(counter: Counter[Any], key: Any) -> bool:
    """Whether it was the last one."""
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True


def _tier(event: dict[str, Any]) -> Tier | None:
    """None: a place that we have no word for."""
    return _TIERS.get(str(event.get("medium") or "GPU").lower())


def _token_ids(told: list[Any]) -> list[int]:
    """Of SGLang with speculation, each token comes with the one behind it."""
    return [token[0] for token in told] if told and isinstance(told[0], list | tuple) else told


def _has_media(extra: Sequence[Any] | None) -> bool:
    """Media come as pairs of identifier and offset; a LoRA's name and a salt as text."""
    return any(not isinstance(key, str) for key in extra or ())


def _salt(extra: Sequence[Any] | None, lora: str | None) -> str | None:
    keys = [key for key in extra or () if isinstance(key, str)]
    if lora and keys and keys[0] == lora:
        keys = keys[1:]
    return keys[0] if keys else None
