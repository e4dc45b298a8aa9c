"""How long a step takes on the imagined accelerators: the advisor's model of a step, over what the step's plan computes."""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.step import StepTimes, step_times
from polyphase.engines.batching.scheduler import Pull, Row
from polyphase.engines.mock.imagined import Imagined


def imagined_times(imagined: Imagined, speedup: float = 1.0) -> MockTimes:
    """`speedup` divides all times; infinite makes them zero."""
    times = step_times(shipped_calibration(), imagined.setting, imagined.mapping)
    return MockTimes(times, imagined.kv_bytes_per_token / imagined.link_bytes_per_s, speedup)


class MockTimes:
    """Times in whole nanoseconds."""

    def __init__(self, times: StepTimes, move_token_s: float, speedup: float = 1.0) -> None:
        """`move_token_s`: to copy one token's KV over the link."""
        self._times = times
        self._scale = 1e6 / speedup  # from milliseconds
        self._move_token_ms = move_token_s * 1e3

    def step_ns(self, rows: Iterable[Row], decode_count: int = 0, decode_tokens: int = 0) -> int:
        """`decode_count` sequences decode besides the rows; they have `decode_tokens` tokens together.

        A row of one token is taken for a decoding one, also if it is a prompt's last: it costs the same.
        """
        decoding, seen = decode_count, decode_tokens
        prompt_tokens, pairs = 0, 0.0
        for row in rows:
            count, end = row.count, row.start + row.count
            if count == 1:
                decoding += 1
                seen += end
            else:
                prompt_tokens += count
                pairs += count * (end - (count - 1) / 2)
        return int(self._times.step_ms(decoding, seen, prompt_tokens, pairs) * self._scale)

    def decode_steps_ns(self, row_count: int, read_tokens: int, step_count: int) -> list[int]:
        """Of so many steps one after the other in which `row_count` sequences decode, which have `read_tokens` tokens before the first."""
        besides_ms, token_ms, scale = self._times.step_ms(row_count, 0), self._times.context_token_ms, self._scale
        reads = range(read_tokens, read_tokens + step_count * row_count, row_count)
        return [int((besides_ms + read * token_ms) * scale) for read in reads]

    def pull_ns(self, pull: Pull, block_size: int) -> int:
        """Time to copy offered blocks over the link."""
        return int((pull.token_count - pull.first_block * block_size) * self._move_token_ms * self._scale)
