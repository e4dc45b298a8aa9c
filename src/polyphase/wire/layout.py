"""The shape of a KV block in memory: of our own engines (`KvLayout`), and in general (`KvShape`).

Two families of attention:

    grouped   keys and values of `head_count` heads, `head_dim` wide. With `tp_size` ranks, each holds its share of the heads; with more
              ranks than heads, `tp_size / head_count` neighbours hold the same one.
    latent    one compressed vector of `head_dim` numbers a token (MLA), which every rank holds whole.

A block is contiguous, its axes in `order`, the last one fastest. A latent block has the axes layer, token and dim only.
"""

from __future__ import annotations

import msgspec

from polyphase.core.errors import TransferRefused


class KvLayout(msgspec.Struct, frozen=True):
    """Shape of one KV block in memory; a block is contiguous over all layers:

        block = [layer_count, 2 (keys, values), block_size, kv_head_count, head_dim] of dtype

    Two workers may copy blocks byte by byte if their layouts are equal; `fingerprint` also holds the model, so that
    blocks of another model with the same shape do not pass.
    """

    dtype: str  # "float32", "bfloat16", "float16"
    layer_count: int
    kv_head_count: int
    head_dim: int
    block_size: int  # tokens
    block_bytes: int
    fingerprint: str


GROUPED_AXES = ("layer", "kv", "token", "head", "dim")
LATENT_AXES = ("layer", "token", "dim")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


class KvShape(msgspec.Struct, frozen=True):
    """Travels between agents. Made by hand or by `from_layout`; `check` says what is wrong with it."""

    model: str  # fingerprint of what both sides must share: weights, and whatever else changes what KV means
    family: str  # "grouped" or "latent"
    dtype: str
    layer_count: int
    head_count: int  # of the whole model; 1 for latent
    head_dim: int
    block_size: int  # tokens
    tp_size: int = 1
    tp_rank: int = 0
    order: tuple[str, ...] = GROUPED_AXES

    @property
    def heads(self) -> range:
        """The heads of the whole model that this rank holds."""
        if self.family == "latent":
            return range(1)
        if self.tp_size <= self.head_count:
            share = self.head_count // self.tp_size
            return range(self.tp_rank * share, (self.tp_rank + 1) * share)
        first = self.tp_rank * self.head_count // self.tp_size
        return range(first, first + 1)

    @property
    def axis_sizes(self) -> dict[str, int]:
        sizes = {"layer": self.layer_count, "token": self.block_size, "dim": self.head_dim}
        return sizes if self.family == "latent" else {**sizes, "kv": 2, "head": len(self.heads)}

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Of a block, in its own order."""
        return tuple(self.axis_sizes[axis] for axis in self.order)

    @property
    def block_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for size in self.dimensions:
            count *= size
        return count

    def check(self) -> None:
        """Raises: TransferRefused if this describes no block."""
        axes = {"grouped": GROUPED_AXES, "latent": LATENT_AXES}.get(self.family)
        if axes is None:
            raise TransferRefused(f"KV of family {self.family!r} is not known; there are grouped and latent")
        if self.dtype not in ITEM_BYTES:
            raise TransferRefused(f"KV of dtype {self.dtype!r} is not known; there are {', '.join(ITEM_BYTES)}")
        if sorted(self.order) != sorted(axes):
            raise TransferRefused(f"a {self.family} block has the axes {', '.join(axes)} in some order, not {', '.join(self.order)}")
        counts = (self.layer_count, self.head_count, self.head_dim, self.block_size, self.tp_size)
        if min(counts) < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise TransferRefused(f"counts must be positive, and the rank one of the {self.tp_size} ranks: {self}")
        if self.family == "latent" and self.head_count != 1:
            raise TransferRefused(f"latent KV has one vector a token, not {self.head_count} heads")
        larger, smaller = max(self.head_count, self.tp_size), min(self.head_count, self.tp_size)
        if self.family == "grouped" and larger % smaller:
            raise TransferRefused(f"{self.head_count} KV heads cannot be shared evenly by {self.tp_size} ranks")


def from_layout(layout: KvLayout, tp_size: int = 1, tp_rank: int = 0) -> KvShape:
    """Of our own engines' blocks, which hold keys and values of `kv_head_count` heads of each rank."""
    return KvShape(
        model=layout.fingerprint,
        family="grouped",
        dtype=layout.dtype,
        layer_count=layout.layer_count,
        head_count=layout.kv_head_count * tp_size,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )
