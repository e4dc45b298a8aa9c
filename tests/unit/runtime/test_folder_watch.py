"""What follows from a change a moment later is seen too, without waiting for the next regular look."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from polyphase.runtime.folder_watch import folder_changes


async def test_a_change_is_told_again_when_it_has_settled(run_folder: Path) -> None:
    """A dying process's file is closed before its lock is dropped: who looks only then sees it locked, and no further event comes."""
    async with contextlib.aclosing(folder_changes(run_folder, check_interval_s=3600)) as changes, asyncio.timeout(20):
        await anext(changes)
        (run_folder / "file").write_text("x")  # one change: one close
        for _ in range(4):
            await anext(changes)
