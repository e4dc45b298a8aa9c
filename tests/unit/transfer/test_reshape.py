"""Reshaping: every pair of a small matrix of shapes against numpy, and refusals with a reason."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from polyphase.core.errors import ForeignDescriptor, TransferRefused
from polyphase.transfer import Agent, HostMemory, Region, Session, SharedPool, Verdict
from polyphase.transfer.reshape import KvShape, apply, fetch, from_layout, plan, plan_regions
from polyphase.wire.layout import GROUPED_AXES, LATENT_AXES, KvLayout

fetch_module = import_module("polyphase.transfer.reshape.fetch")

ORDERS = [GROUPED_AXES, ("kv", "layer", "head", "token", "dim"), ("layer", "token", "kv", "head", "dim")]
LATENT_ORDERS = [LATENT_AXES, ("token", "layer", "dim")]
TOKENS = 53


def grouped(**changes: Any) -> KvShape:
    fields = {"model": "m", "family": "grouped", "dtype": "float32", "layer_count": 3, "head_count": 4, "head_dim": 2, "block_size": 4}
    return KvShape(**{**fields, **changes})


def latent(**changes: Any) -> KvShape:
    return grouped(**{"family": "latent", "head_count": 1, "order": LATENT_AXES, **changes})


def whole_kv(shape: KvShape) -> np.ndarray:
    """What the model computed: [layer, kv, token, head, dim] of all heads, small whole numbers that every dtype can hold."""
    kv = 1 if shape.family == "latent" else 2
    size = (shape.layer_count, kv, TOKENS, shape.head_count, shape.head_dim)
    return np.random.default_rng(1).integers(-128, 128, size).astype(np.float32)


def to_bits(numbers: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return torch.from_numpy(numbers.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    return numbers.astype(dtype)


def blocks_of(shape: KvShape, kv: np.ndarray) -> np.ndarray:
    """The straightforward way: block after block, as a rank would hold them; zero behind the last token."""
    count = -(-TOKENS // shape.block_size)
    padded = np.zeros((*kv.shape[:2], count * shape.block_size, *kv.shape[3:]), dtype=np.float32)
    padded[:, :, :TOKENS] = kv
    blocks = []
    for number in range(count):
        tokens = slice(number * shape.block_size, (number + 1) * shape.block_size)
        block = padded[:, :, tokens, shape.heads.start : shape.heads.stop, :]
        axes = list(GROUPED_AXES)
        if shape.family == "latent":
            block, axes = block[:, 0, :, 0, :], list(LATENT_AXES)
        blocks.append(block.transpose([axes.index(axis) for axis in shape.order]))
    return to_bits(np.ascontiguousarray(np.stack(blocks)), shape.dtype)


def pairs() -> Iterator[tuple[list[KvShape], KvShape]]:
    sizes = [1, 4, 6, 16]
    for tp_source, tp_target, size_source, size_target in itertools.product([1, 2, 4, 8], [1, 2, 4, 8], sizes, sizes):
        for rank in range(tp_target):
            order, other = ORDERS[(tp_source + size_source) % 3], ORDERS[(tp_target + size_target + rank) % 3]
            sources = [grouped(tp_size=tp_source, tp_rank=r, block_size=size_source, order=order) for r in range(tp_source)]
            yield sources, grouped(tp_size=tp_target, tp_rank=rank, block_size=size_target, order=other)
    for source, target in itertools.product(["float32", "float16", "bfloat16"], repeat=2):
        for order, other in itertools.product(ORDERS, repeat=2):
            sources = [grouped(dtype=source, tp_size=2, tp_rank=r, order=order) for r in (1, 0)]
            yield sources, grouped(dtype=target, block_size=6, order=other)
    for tp_source, tp_target, size_source, size_target in itertools.product([1, 2], [1, 2], sizes, sizes):
        for order, other in itertools.product(LATENT_ORDERS, repeat=2):
            sources = [latent(tp_size=tp_source, tp_rank=r, block_size=size_source, order=order) for r in range(tp_source)]
            yield sources, latent(tp_size=tp_target, tp_rank=tp_target - 1, block_size=size_target, order=other)


def run(sources: list[KvShape], target: KvShape) -> tuple[np.ndarray, np.ndarray]:
    made = plan(sources, target)
    kv = whole_kv(target)
    wanted = blocks_of(target, kv)
    ids = list(np.random.default_rng(2).permutation(len(wanted) + 3)[: made.target_block_count(TOKENS)])
    memory = np.zeros(((len(wanted) + 3), *wanted.shape[1:]), dtype=wanted.dtype)
    read = [memoryview(blocks_of(shape, kv).tobytes()) for shape in made.sources]
    apply(made, read, memoryview(memory).cast("B"), ids, TOKENS)
    untouched = [block_id for block_id in range(len(memory)) if block_id not in ids]
    assert not memory[untouched].any()
    return memory[ids], wanted


def test_the_whole_matrix() -> None:
    checked = 0
    for sources, target in pairs():
        found, wanted = run(sources, target)
        assert np.array_equal(found, wanted), (sources, target)
        checked += 1
    assert checked > 1000


def test_ranks_that_give_nothing_new_are_not_read() -> None:
    eight = [grouped(tp_size=8, tp_rank=rank) for rank in range(8)]  # four heads: neighbours hold the same one
    assert [shape.tp_rank for shape in plan(eight, grouped()).sources] == [0, 2, 4, 6]
    assert [shape.tp_rank for shape in plan(eight, grouped(tp_size=2, tp_rank=1)).sources] == [4, 6]
    assert len(plan([latent(tp_size=2, tp_rank=rank) for rank in (0, 1)], latent()).sources) == 1


def test_equal_shapes_need_no_plan() -> None:
    assert plan([grouped()], grouped()).is_copy
    assert plan([grouped(tp_size=8, tp_rank=3)], grouped(tp_size=4, tp_rank=1)).is_copy
    assert not plan([grouped()], grouped(block_size=6)).is_copy
    assert not plan([grouped()], grouped(dtype="float16")).is_copy


def test_bfloat16_is_rounded_as_torch_does() -> None:
    numbers = np.random.default_rng(3).normal(size=4096).astype(np.float32)
    numbers[:4] = [np.inf, -np.inf, np.nan, 3.4e38]
    source = KvShape("m", "latent", "float32", 1, 1, 64, 16, order=LATENT_AXES)
    target = msgspec.structs.replace(source, dtype="bfloat16")
    memory = np.zeros(4096, dtype=np.uint16)
    apply(plan([source], target), [memoryview(numbers).cast("B")], memoryview(memory).cast("B"), range(4), 64)
    wanted = torch.from_numpy(numbers).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(memory).view(torch.bfloat16)[:2], wanted[:2])
    assert torch.from_numpy(memory).view(torch.bfloat16)[2].isnan()
    assert np.array_equal(memory[3:], wanted.view(torch.uint16).numpy()[3:])


@pytest.mark.parametrize(
    ("sources", "target", "reason"),
    [
        ([grouped(model="x")], grouped(), "model 'x', the target's 'm'"),
        ([grouped(layer_count=2)], grouped(), "layer_count 2, the target's 3"),
        ([grouped(head_dim=4)], grouped(), "head_dim 4"),
        ([grouped(head_count=2)], grouped(), "head_count 2"),
        ([latent()], grouped(head_count=1), "family 'latent'"),
        ([grouped(tp_size=2, tp_rank=0)], grouped(), "no source rank holds KV head 2; they hold 0 to 1"),
        ([grouped(dtype="int8")], grouped(), "int8 cannot become float32"),
        ([grouped(dtype="float8_e4m3fn")], grouped(dtype="float8_e5m2"), "without their scales"),
        ([], grouped(), "no source rank"),
        ([grouped(tp_size=2), grouped(tp_size=2, tp_rank=1, block_size=8)], grouped(), "different block sizes"),
        ([grouped(tp_size=3)], grouped(), "4 KV heads cannot be shared evenly by 3 ranks"),
        ([grouped(dtype="int3")], grouped(), "dtype 'int3' is not known"),
        ([grouped(family="linear")], grouped(), "family 'linear'"),
        ([grouped(order=LATENT_AXES)], grouped(), "has the axes"),
        ([grouped(tp_rank=1)], grouped(), "the rank one of the 1 ranks"),
        ([latent(head_count=2)], latent(), "one vector a token, not 2 heads"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(sources: list[KvShape], target: KvShape, reason: str) -> None:
    with pytest.raises(TransferRefused, match=reason):
        plan(sources, target)


def test_memories_that_do_not_have_the_blocks() -> None:
    made = plan([grouped()], grouped(block_size=8))
    good = [memoryview(bytes(grouped().block_bytes * 2))]
    target = memoryview(bytearray(grouped(block_size=8).block_bytes))
    for sources, ids in ((good, [0, 1]), ([], [0]), ([good[0][:-1]], [0]), (good, [1])):
        with pytest.raises(ForeignDescriptor):
            apply(made, sources, target, ids, 8)


def test_our_own_layout() -> None:
    shape = from_layout(KvLayout("bfloat16", 2, 2, 64, 16, 2 * 2 * 16 * 2 * 64 * 2, "f"), tp_size=4, tp_rank=3)
    assert (shape.head_count, shape.heads, shape.block_bytes) == (8, range(6, 8), 2 * 2 * 16 * 2 * 64 * 2)


class TestFetch:
    """Two ranks of blocks of 4 tokens, in agents of their own, become one of blocks of 6."""

    def met(self, stack: ExitStack) -> tuple[list[Region], list[Session], Region]:
        reader = stack.enter_context(Agent("reader"))
        target = grouped(block_size=6)
        into = reader.register(stack.enter_context(SharedPool.create(12, target.block_bytes)), shape=target)
        regions, sessions = [], []
        for rank in (0, 1):
            shape = grouped(tp_size=2, tp_rank=rank)
            pool = stack.enter_context(SharedPool.create(16, shape.block_bytes))
            content = blocks_of(shape, whole_kv(shape)).tobytes()
            pool.blocks[: len(content)] = content
            agent = stack.enter_context(Agent(f"rank-{rank}"))
            regions.append(agent.register(pool, shape=shape))
            sessions.append(stack.enter_context(reader.connect(agent.metadata())))
        return regions, sessions, into

    @pytest.mark.parametrize("staging_bytes", [1, 1 << 20])
    def test_blocks_of_two_ranks_are_put_together(self, staging_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch_module, "STAGING_BYTES", staging_bytes)
        with ExitStack() as stack:
            regions, sessions, into = self.met(stack)
            made = plan_regions([region.card for region in regions], into)
            remote = [s.blocks(r.region_id, range(14), r.generations(range(14))) for r, s in zip(regions, sessions, strict=True)]
            regions[1].renew([5])  # tokens 20 to 23, which are in target block 3
            verdicts = fetch(made, remote, into.blocks(range(2, 11)), TOKENS, 20)
            assert [place for place, verdict in enumerate(verdicts) if verdict != Verdict.DONE] == [3]
            assert verdicts[3] == Verdict.STALE
            wanted = blocks_of(grouped(block_size=6), whole_kv(grouped()))
            found = np.frombuffer(into.host_blocks.blocks, dtype=np.float32).reshape(12, *wanted.shape[1:])[2:11]
            good = [place for place in range(9) if place != 3]
            assert np.array_equal(found[good], wanted[good])
            with pytest.raises(ForeignDescriptor, match="53 tokens are 14 blocks of each of 2 source ranks and 9 target blocks"):
                fetch(made, remote[:1], into.blocks(range(9)), TOKENS, 20)
            del found

    def test_regions_without_a_shape_or_of_another_model_are_refused(self) -> None:
        with ExitStack() as stack:
            regions, _, into = self.met(stack)
            with pytest.raises(TransferRefused, match="no source rank holds KV head 2"):
                plan_regions([regions[0].card], into)
            with pytest.raises(TransferRefused, match="without the shape"):
                plan_regions([msgspec.structs.replace(regions[0].card, shape=None)], into)
            with pytest.raises(ForeignDescriptor, match="but the shape says"):
                into.agent.register(HostMemory(bytearray(64), 64), shape=grouped())
