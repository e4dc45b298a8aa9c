"""What a simulated fleet is asked: conversations of one or more turns, from a trace or made up from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from polyphase.core.errors import ConfigurationError
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import SequenceHash

MOONCAKE_BLOCK_SIZE = 512  # tokens that one of the trace's `hash_ids` stands for
_FIRST_TOKEN = 1000


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `tokens` makes its prompt when it is needed: thousands of long prompts at once would take gigabytes."""

    tokens: Callable[[], list[int]]
    token_count: int
    sequence_hashes: Sequence[SequenceHash]
    max_tokens: int
    think_ns: int = 0  # between the end of the turn before and this one


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
                turn = _turn_of_ids([int(i) for i in row["hash_ids"]], int(row["input_length"]), int(row["output_length"]))
                load.append(Conversation(int(row["timestamp"] * 1e6 / speedup), (turn,)))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"line {number} of {path} is not of Mooncake's form: timestamp, input_length, output_length, hash_ids ({error!r})"
                ) from error
    return load


def _turn_of_ids(hash_ids: Sequence[int], token_count: int, output_count: int) -> Turn:
    """A block's tokens are its id over and over: equal ids, equal tokens."""

    def tokens() -> list[int]:
        made: list[int] = []
        for hash_id in hash_ids:
            made += [hash_id + _FIRST_TOKEN] * MOONCAKE_BLOCK_SIZE
        return made[:token_count] if len(made) >= token_count else made + [1] * (token_count - len(made))

    return Turn(tokens, token_count, sequence_hashes(tokens(), MOONCAKE_BLOCK_SIZE), max(1, output_count))


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
        history = list(system)
        turns = []
        for number in range(1 + min(4 * shape.turn_count, int(draw.expovariate(1 / max(shape.turn_count - 0.5, 0.1))))):
            history = history + _fresh_tokens(draw, _around(draw, shape.message_tokens))
            count = _around(draw, shape.answer_tokens)
            think_ns = int(draw.expovariate(1 / shape.think_s) * 1e9) if number else 0
            turns.append(_turn_of_tokens(history, count, block_size, think_ns))
            history = history + answer(history, count)
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
            head = hot if draw.random() < 0.5 else _fresh_tokens(draw, shape.system_tokens // 2)
            prompt = head + _fresh_tokens(draw, _around(draw, shape.message_tokens))
            turn = _turn_of_tokens(prompt, _around(draw, shape.answer_tokens), block_size, 0)
            load.append(Conversation(int((burst * burst_every_s + number * 0.05 / requests_per_burst) * 1e9), (turn,)))
    return load


def _turn_of_tokens(tokens: list[int], output_count: int, block_size: int, think_ns: int) -> Turn:
    return Turn(lambda: tokens, len(tokens), sequence_hashes(tokens, block_size), output_count, think_ns)


def _fresh_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(_FIRST_TOKEN, 100_000) for _ in range(count)]


def _around(draw: random.Random, mean: int) -> int:
    """Log-normal, so that a few are long."""
    return max(1, min(10 * mean, int(draw.lognormvariate(0, 0.8) * mean / 1.377)))
