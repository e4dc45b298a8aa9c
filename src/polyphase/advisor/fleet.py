"""The accelerators that there are: `16xh200`, or several kinds: `16xh100+8xb200`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyphase.advisor.accelerators import Accelerator
from polyphase.advisor.catalog import Library
from polyphase.core.errors import ConfigurationError

_POOL = re.compile(r"\s*(\d+)\s*[x×*]\s*(\S+)\s*")
_EXAMPLE = "write for example 16xh200, or 16xh100+8xb200"
MAX_GPUS = 100_000


@dataclass(frozen=True, slots=True)
class Pool:
    count: int
    accelerator: Accelerator

    def __str__(self) -> str:
        return f"{self.count}x{self.accelerator.name}"


@dataclass(frozen=True, slots=True)
class Fleet:
    pools: tuple[Pool, ...]

    @property
    def gpu_count(self) -> int:
        return sum(pool.count for pool in self.pools)

    def __str__(self) -> str:
        return "+".join(map(str, self.pools))


def parse_fleet(text: str, library: Library) -> Fleet:
    """Raises: ConfigurationError, with an example or the nearest names."""
    pools: dict[str, Pool] = {}
    for part in text.split("+"):
        found = _POOL.fullmatch(part)
        if not found:
            raise ConfigurationError(f"{text!r} is not a fleet; {_EXAMPLE}")
        count, accelerator = int(found[1]), library.accelerator(found[2])
        if not 1 <= count <= MAX_GPUS:
            raise ConfigurationError(f"a fleet of {count} {accelerator.name} cannot be planned; between 1 and {MAX_GPUS} are possible")
        before = pools[accelerator.name].count if accelerator.name in pools else 0
        pools[accelerator.name] = Pool(before + count, accelerator)
    return Fleet(tuple(pools.values()))
