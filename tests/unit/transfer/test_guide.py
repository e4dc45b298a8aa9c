"""The example of docs/transfer.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[3] / "docs" / "transfer.md"


def test_the_thirty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    printed = capsys.readouterr().out
    assert "shm: chosen: both run on this host" in printed
    assert "free again: " in printed  # released, or lost with its agent: the example ends at once
    assert "b'got them'" in printed
    own = names["own"]
    assert [own.blocks[place * 65536] for place in range(3)] == [7, 3, 12]  # type: ignore[attr-defined]
