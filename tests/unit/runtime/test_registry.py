"""The registry tells who lives, at once who died by whatever cause, and soon who stands still."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.runtime import Joined, Left, Registry, RegistryChange, Updated, folder_watch
from polyphase.runtime.registry import Lease, difference
from polyphase.wire.cards import Role, WorkerEntry
from tests.unit.runtime.waiting import eventually


def entry(worker_id: str = "decode-0", epoch: int = 1, **changes: object) -> WorkerEntry:
    plain = WorkerEntry(
        worker_id=worker_id,
        epoch=epoch,
        role=Role.DECODE,
        model="m",
        pid=1,
        host="h",
        request_endpoint="ipc:///r",
        event_endpoint="ipc:///e",
    )
    return msgspec.structs.replace(plain, **changes)


async def next_change(changes: AsyncGenerator[RegistryChange, None]) -> RegistryChange:
    async with asyncio.timeout(20):
        return await anext(changes)


@asynccontextmanager
async def watching(folder: Path, ttl_s: float = 60) -> AsyncIterator[AsyncGenerator[RegistryChange, None]]:
    async with contextlib.aclosing(Registry(folder, ttl_s).watch()) as changes:
        yield changes


OWNER = """
import asyncio, sys
from pathlib import Path
import msgspec
from polyphase.runtime import Registry
from polyphase.wire.cards import WorkerEntry

async def main():
    entry = msgspec.json.decode(sys.argv[2], type=WorkerEntry)
    lease = Registry(Path(sys.argv[1])).announce(entry)
    print("announced", flush=True)
    await lease.renew()

asyncio.run(main())
"""


@asynccontextmanager
async def owner_process(folder: Path, announced: WorkerEntry) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-c", OWNER, str(folder), msgspec.json.encode(announced).decode()]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"announced\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def test_announced_entries_are_seen_until_withdrawn(run_folder: Path) -> None:
    registry = Registry(run_folder)
    assert registry.entries() == []
    with registry.announce(entry("a")) as first, registry.announce(entry("b")):
        assert registry.entries() == [entry("a"), entry("b")]
        first.update(entry("a", is_draining=True))
        assert Registry(run_folder).entries() == [entry("a", is_draining=True), entry("b")]
        first.withdraw()
        first.withdraw()
        first.update(entry("a"))
        assert registry.entries() == [entry("b")]
    assert os.listdir(registry.folder) == []


def test_a_claimed_name_shows_nothing_and_is_taken(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyphase.runtime.registry.CLAIM_TIMEOUT_S", 0.05)
    registry = Registry(run_folder)
    with registry.claim("a") as lease:
        assert registry.entries() == []
        with pytest.raises(ConfigurationError, match=r"'a' runs already .* another --worker-id"):
            Registry(run_folder).claim("a")
        lease.publish(entry("a"))
        with pytest.raises(ConfigurationError, match="runs already"):
            Registry(run_folder).announce(entry("a"))
        assert registry.entries() == [entry("a")]
    registry.announce(entry("a", epoch=2)).withdraw()


def test_a_lock_held_for_a_look_delays_a_claim_only(run_folder: Path) -> None:
    with Registry(run_folder).claim("a"):
        pass
    for _ in range(50):
        with Registry(run_folder).announce(entry("a")):
            assert Registry(run_folder).entries() == [entry("a")]


def test_files_of_the_dead_are_removed(run_folder: Path) -> None:
    registry = Registry(run_folder)
    registry.announce(entry("a")).withdraw()
    (registry.folder / "a.json").write_bytes(msgspec.json.encode(entry("a")))
    assert registry.entries() == []
    assert os.listdir(registry.folder) == []


def test_foreign_and_torn_files_are_ignored_with_one_line(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(run_folder)
    with registry.announce(entry("a")), registry.claim("b"):
        data = msgspec.json.encode(entry("b"))
        os.write(os.open(registry.folder / "b.json", os.O_WRONLY), data[: len(data) // 2])
        (registry.folder / "notes.txt").write_text("hello")
        (registry.folder / "folder.json").mkdir()
        (registry.folder / "link.json").symlink_to(registry.folder / "a.json")
        os.mkfifo(registry.folder / "pipe.json")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert registry.entries() == [entry("a")]
        lines = [record.message for record in caplog.records]
        assert sum("b.json is not a registry entry" in line for line in lines) == 1
        assert sum("link.json" in line for line in lines) == 1
        assert len(lines) <= 4


def test_an_entry_must_bear_its_file_s_name(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(run_folder)
    with registry.claim("a") as lease:
        lease.publish(entry("z"))
        assert registry.entries() == []
        assert "speaks of worker 'z'" in caplog.text


def test_an_owner_that_stands_still_is_not_listed_but_keeps_its_name(run_folder: Path) -> None:
    registry = Registry(run_folder, ttl_s=0)
    with registry.announce(entry("a")):
        assert registry.entries() == []
        assert os.listdir(registry.folder) == ["a.json"]


@pytest.mark.parametrize("worker_id", ["", "../a", "a/b", "a b", ".hidden", "x" * 49, "é"])
def test_unusable_names_are_refused(run_folder: Path, worker_id: str) -> None:
    with pytest.raises(ConfigurationError, match="is not usable"):
        Registry(run_folder).claim(worker_id)


async def test_a_folder_open_to_others_is_refused(run_folder: Path) -> None:
    os.chmod(run_folder, 0o755)
    with pytest.raises(ConfigurationError, match=r"open to other users \(mode 0755\).*chmod 700"):
        Registry(run_folder).claim("a")
    os.chmod(run_folder, 0o700)
    Registry(run_folder).claim("a").withdraw()
    os.chmod(run_folder / "workers", 0o770)
    with pytest.raises(ConfigurationError, match="open to other users"):
        Registry(run_folder).entries()
    with pytest.raises(ConfigurationError, match="open to other users"):
        async with watching(run_folder) as changes:
            await anext(changes)


def test_a_run_folder_that_is_a_file_is_refused(run_folder: Path) -> None:
    (run_folder / "file").write_text("")
    with pytest.raises(ConfigurationError):
        Registry(run_folder / "file").claim("a")


@pytest.fixture(params=["inotify", "polling"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "polling":
        monkeypatch.setattr(folder_watch, "open_inotify", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("way")
async def test_watching_sees_every_change(run_folder: Path) -> None:
    registry = Registry(run_folder)
    with registry.announce(entry("a")) as lease:
        async with watching(run_folder) as changes:
            assert await next_change(changes) == Joined(entry("a"))
            other = registry.announce(entry("b"))
            assert await next_change(changes) == Joined(entry("b"))
            lease.update(entry("a", is_draining=True))
            assert await next_change(changes) == Updated(entry("a", is_draining=True))
            lease.update(entry("a", epoch=7))
            assert await next_change(changes) == Left("a", 1)
            assert await next_change(changes) == Joined(entry("a", epoch=7))
            other.withdraw()
            assert await next_change(changes) == Left("b", 1)


async def test_a_killed_owner_is_seen_by_the_kernel_s_word_alone(run_folder: Path) -> None:
    """The time to live is an hour here, so that only the closed file can have told."""
    async with watching(run_folder, ttl_s=3600) as changes, owner_process(run_folder, entry("a", epoch=3)) as owner:
        assert await next_change(changes) == Joined(entry("a", epoch=3))
        owner.kill()
        assert await next_change(changes) == Left("a", 3)
        with Registry(run_folder).announce(entry("a", epoch=4)):
            assert await next_change(changes) == Joined(entry("a", epoch=4))


async def test_a_stopped_owner_leaves_and_joins_again(run_folder: Path) -> None:
    async with watching(run_folder, ttl_s=2.5) as changes, owner_process(run_folder, entry("a")) as owner:
        assert await next_change(changes) == Joined(entry("a"))
        owner.send_signal(signal.SIGSTOP)
        assert await next_change(changes) == Left("a", 1)
        owner.send_signal(signal.SIGCONT)
        assert await next_change(changes) == Joined(entry("a"))


async def test_renewal_keeps_an_entry_alive(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyphase.runtime.registry.RENEWAL_INTERVAL_S", 0.01)
    with Registry(run_folder).announce(entry("a")) as lease:
        path = run_folder / "workers" / "a.json"
        os.utime(path, ns=(0, 0))
        renewal = asyncio.create_task(lease.renew())
        await eventually(lambda: os.stat(path).st_mtime_ns > 0)
        renewal.cancel()


def test_a_lease_of_a_crashed_publication_is_taken_over(run_folder: Path) -> None:
    registry = Registry(run_folder)
    registry.claim("a").withdraw()
    (registry.folder / "a.new").write_text("half")
    lease: Lease
    with registry.announce(entry("a")) as lease:
        assert registry.entries() == [entry("a")]
        lease.update(entry("a", role=Role.PREFILL))
        assert registry.entries()[0].role is Role.PREFILL
    assert os.listdir(registry.folder) == []


def test_departures_come_before_arrivals() -> None:
    known = {"a": entry("a"), "b": entry("b")}
    found = {"b": entry("b", epoch=2), "c": entry("c")}
    assert difference(known, found) == [Left("a", 1), Left("b", 1), Joined(entry("b", epoch=2)), Joined(entry("c"))]
    assert difference(found, found) == []
