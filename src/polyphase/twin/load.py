"""What a simulated fleet is asked: conversations of one or more turns, from a trace or made up from a seed.

A request is known by how many tokens it has and how its blocks are named, those of its answer included; the tokens are not kept.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from polyphase.core.errors import ConfigurationError
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import ContentKey, SequenceHash
from polyphase.kv import GivenNames

MOONCAKE_BLOCK_SIZE = 512  # tokens that one of the trace's `hash_ids` stands for
_OWN_IDS = 2**31  # from here on, ids that no trace has: each request's own


@dataclass(frozen=True, slots=True)
class Turn:
    """One request."""

    token_count: int  # of the prompt
    sequence_hashes: Sequence[SequenceHash]  # of the prompt's full blocks
    names: GivenNames  # of these, and of the blocks that the answer fills
    max_tokens: int  # the length of the answer
    think_ns: int = 0  # between the end of the turn before and this one

    @classmethod
    def of_hashes(cls, hashes: Sequence[SequenceHash], token_count: int, output_count: int, block_size: int, think_ns: int = 0) -> Turn:
        """`hashes` are of prompt and answer."""
        # A sequence hash does for a content key where nobody forges collisions.
        names = GivenNames(cast("Sequence[ContentKey]", hashes), hashes)
        return cls(token_count, hashes[: token_count // block_size], names, output_count, think_ns)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which each begins when the one before has been answered."""

    start_ns: int
    turns: Sequence[Turn]


def mooncake_load(path: Path, request_count: int, speedup: float = 1.0) -> list[Conversation]:
    """The first requests of a trace in Mooncake's form, each by itself at its own time; block size `MOONCAKE_BLOCK_SIZE`.

    Args:
        speedup: by which the times between arrivals are divided.

    Raises: ConfigurationError if a line is not of that form.
    """
    load: list[Conversation] = []
    with path.open() as lines:
        for number, line in enumerate(islice(lines, request_count), start=1):
            try:
                row = json.loads(line)
                turn = _turn_of_ids(row["hash_ids"], int(row["input_length"]), max(1, int(row["output_length"])), number)
                load.append(Conversation(int(row["timestamp"] * 1e6 / speedup), (turn,)))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ConfigurationError(
                    f"line {number} of {path} is not of Mooncake's form: timestamp, input_length, output_length, hash_ids ({error!r})"
                ) from error
    return load


def _turn_of_ids(hash_ids: Sequence[int], token_count: int, output_count: int, number: int) -> Turn:
    """Equal ids, equal tokens; what comes behind the prompt's last full block is this request's alone."""
    full_count = token_count // MOONCAKE_BLOCK_SIZE
    own_count = (token_count + output_count) // MOONCAKE_BLOCK_SIZE - full_count
    if len(hash_ids) < full_count:
        raise ValueError(f"{len(hash_ids)} hash_ids for {full_count} full blocks")
    # As if a block were one token long: hashes are names, and it does not matter of what.
    hashes = sequence_hashes([*hash_ids[:full_count], *[_OWN_IDS + number] * own_count], 1)
    return Turn.of_hashes(hashes, token_count, output_count, MOONCAKE_BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Sizes are means; lengths of messages and answers, pauses and numbers of turns are drawn around them."""

    system_tokens: int = 2048  # the same for all
    message_tokens: int = 400
    answer_tokens: int = 200
    turn_count: int = 5
    think_s: float = 10.0


Answer = Callable[[list[int], int], list[int]]
"""(prompt, count) → what the engine will say, so that the next turn's prompt can hold it."""


def chat_load(
    conversation_count: int, starts_per_s: float, answer: Answer, block_size: int, seed: int = 0, shape: ChatShape | None = None
) -> list[Conversation]:
    """Chats of several turns under one system prompt, begun at random instants."""
    shape = shape or ChatShape()
    draw = random.Random(seed)
    system = _fresh_tokens(draw, shape.system_tokens)
    start_s = 0.0
    load = []
    for _ in range(conversation_count):
        start_s += draw.expovariate(starts_per_s)
        history = _History(system, block_size)
        turns = []
        for number in range(1 + min(4 * shape.turn_count, int(draw.expovariate(1 / max(shape.turn_count - 0.5, 0.1))))):
            history.add(_fresh_tokens(draw, _around(draw, shape.message_tokens)))
            count = _around(draw, shape.answer_tokens)
            think_ns = int(draw.expovariate(1 / shape.think_s) * 1e9) if number else 0
            turns.append(history.turn(answer(history.tokens, count), think_ns))
        load.append(Conversation(int(start_s * 1e9), turns))
    return load


def burst_load(
    burst_count: int, requests_per_burst: int, burst_every_s: float, block_size: int, seed: int = 0, shape: ChatShape | None = None
) -> list[Conversation]:
    """Bursts of requests within 50 ms, half of each with a prefix that is hot in this burst: what a job or a popular link does."""
    shape = shape or ChatShape()
    draw = random.Random(seed)
    load = []
    for burst in range(burst_count):
        hot = _fresh_tokens(draw, shape.system_tokens)
        for number in range(requests_per_burst):
            history = _History(hot if draw.random() < 0.5 else _fresh_tokens(draw, shape.system_tokens // 2), block_size)
            history.add(_fresh_tokens(draw, _around(draw, shape.message_tokens)))
            turn = history.turn(_fresh_tokens(draw, _around(draw, shape.answer_tokens)))
            load.append(Conversation(int((burst * burst_every_s + number * 0.05 / requests_per_burst) * 1e9), (turn,)))
    return load


class _History:
    """A conversation so far: its tokens, and the hashes of its full blocks."""

    def __init__(self, tokens: Iterable[int], block_size: int) -> None:
        self.tokens = list(tokens)
        self._block_size = block_size
        self._hashes: list[SequenceHash] = []

    def add(self, tokens: Iterable[int]) -> None:
        self.tokens += tokens

    def turn(self, answer: Iterable[int], think_ns: int = 0) -> Turn:
        """The request that asks for `answer`, which is part of the history then."""
        prompt_count = len(self.tokens)
        self.add(answer)
        fresh = self.tokens[len(self._hashes) * self._block_size :]
        self._hashes += sequence_hashes(fresh, self._block_size, parent=self._hashes[-1] if self._hashes else None)
        output_count = len(self.tokens) - prompt_count
        return Turn.of_hashes(tuple(self._hashes), prompt_count, output_count, self._block_size, think_ns)


def _fresh_tokens(draw: random.Random, count: int) -> array[int]:
    return array("I", draw.randbytes(4 * count))


def _around(draw: random.Random, mean: int) -> int:
    """Log-normal, so that a few are long."""
    return max(1, min(10 * mean, int(draw.lognormvariate(0, 0.8) * mean / 1.377)))
