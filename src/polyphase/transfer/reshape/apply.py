"""Performs a plan on bytes, all blocks of a piece at once. Needs numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyphase.core.errors import ConfigurationError, ForeignDescriptor
from polyphase.transfer.reshape.plan import Piece, Plan
from polyphase.wire.layout import ITEM_BYTES, KvShape

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_NUMPY_NAMES = {"float32": "float32", "float16": "float16"}  # every other dtype is moved as the bits that it is


def apply(plan: Plan, sources: Sequence[memoryview], target: memoryview, target_ids: Sequence[int], token_count: int) -> None:
    """Fill blocks of the target with the first `token_count` tokens of a sequence.

    Args:
        sources: for each of `plan.sources`, its blocks of the sequence, in order and back to back; `plan.source_block_count` of them.
        target: a memory of whole blocks; `target_ids` are those to be filled, in order, `plan.target_block_count` of them.

    What lies behind the last token of the last target block is left or filled with what the source holds there.

    Raises: ForeignDescriptor if the memories do not have the blocks; ConfigurationError without numpy.
    Cost: one pass over the bytes, at 1 to 5 GB/s.
    """
    numpy = _numpy()
    count, target_count = plan.source_block_count(token_count), plan.target_block_count(token_count)
    if len(sources) != len(plan.sources) or len(target_ids) != target_count:
        raise ForeignDescriptor(
            f"{token_count} tokens take blocks of {len(plan.sources)} ranks into {target_count} blocks, "
            f"not of {len(sources)} into {len(target_ids)}"
        )
    views = [_as_blocks(numpy, memory, shape, count) for memory, shape in zip(sources, plan.sources, strict=True)]
    into = _as_blocks(numpy, target, plan.target, max(target_ids, default=-1) + 1)
    ids = numpy.asarray(target_ids, dtype=numpy.int64)
    for piece in plan.pieces:
        starts = numpy.arange(piece.source_block, count, plan.source_period)
        ends = numpy.arange(piece.target_block, target_count, plan.target_period)
        periods = min(len(starts), len(ends))
        if periods:
            box = _source_box(views[piece.source][starts[:periods]], piece)
            found = _converted(numpy, box, plan.sources[piece.source].dtype, plan.target.dtype)
            into[(ids[ends[:periods]], *_target_box(into.ndim, piece))] = found


def _as_blocks(numpy: Any, memory: memoryview, shape: KvShape, count: int) -> Array:
    """The memory's blocks with their axes in the agreed order: [block, layer, (kv,) token, (head,) dim]."""
    if memory.nbytes < count * shape.block_bytes:
        raise ForeignDescriptor(f"{count} blocks of {shape.block_bytes} bytes do not lie in {memory.nbytes} bytes")
    dtype = numpy.dtype(_NUMPY_NAMES.get(shape.dtype, f"uint{8 * ITEM_BYTES[shape.dtype]}"))
    whole = numpy.frombuffer(memory, dtype=dtype, count=count * shape.block_bytes // dtype.itemsize).reshape(count, *shape.dimensions)
    axes = ("layer", "kv", "token", "head", "dim") if shape.family == "grouped" else ("layer", "token", "dim")
    view: Array = whole.transpose(0, *(1 + shape.order.index(axis) for axis in axes))
    return view


def _source_box(blocks: Array, piece: Piece) -> Array:
    tokens = slice(piece.source_token, piece.source_token + piece.token_count)
    if blocks.ndim == 4:
        return blocks[:, :, tokens, :]
    return blocks[:, :, :, tokens, piece.source_head : piece.source_head + piece.head_count, :]


def _target_box(dimensions: int, piece: Piece) -> tuple[slice, ...]:
    tokens = slice(piece.target_token, piece.target_token + piece.token_count)
    everything = slice(None)
    if dimensions == 4:
        return everything, tokens, everything
    return everything, everything, tokens, slice(piece.target_head, piece.target_head + piece.head_count), everything


def _converted(numpy: Any, box: Array, source: str, target: str) -> Array:
    """bfloat16 is the upper half of a float32; rounding goes to the nearest, ties to even, as processors do."""
    if source == target:
        return box
    if source == "bfloat16":
        box = (box.astype(numpy.uint32) << 16).view(numpy.float32)
    if target != "bfloat16":
        with numpy.errstate(over="ignore"):
            found: Array = box.astype(target)
        return found
    bits = box.astype(numpy.float32).view(numpy.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    halves: Array = numpy.where(is_nan, (bits >> 16) | 0x40, rounded >> 16)
    return halves.astype(numpy.uint16)


def _numpy() -> Any:
    try:
        import numpy
    except ModuleNotFoundError:
        raise ConfigurationError("blocks of another shape are put together with numpy, which is not installed: pip install numpy") from None
    return numpy
