"""Worker processes start with a clear word, end as they are told, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from polyphase.runtime import Registry
from polyphase.wire.cards import Role
from polyphase.wire.requests import FinishReason, Question
from tests.unit.runtime.waiting import eventually
from tests.unit.worker.conftest import REPOSITORY, ProcessStarter
from tests.unit.worker.fake_engine import CRASH_THE_LOOP, NEVER_ANSWER, expected_tokens
from tests.unit.worker.peer import Peer
from tests.unit.worker.test_host import hand_over

PATIENCE_S = 60  # with a process, on a machine that has a lot else to do


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Exit code and standard error."""
    async with asyncio.timeout(PATIENCE_S):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


async def test_a_worker_serves_drains_on_sigterm_and_leaves_nothing(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    process = await start_process(step_s=0.01, flags=("--role", "decode"))
    entry = await peer.find(run_folder)
    assert (entry.role, entry.model, entry.pid) == (Role.DECODE, "fake", process.pid)
    request_id = peer.submit("w", [1, 2], max_tokens=60)
    await eventually(lambda: peer.tokens(request_id))
    process.send_signal(signal.SIGTERM)
    assert (await peer.last(request_id)).finish_reason is FinishReason.LENGTH
    assert peer.tokens(request_id) == expected_tokens([1, 2], 60)
    code, errors = await ended(process)
    assert code == 0, errors
    assert f"[{request_id}] finished: length, 60 tokens" in errors
    assert "Traceback" not in errors
    assert os.listdir(run_folder / "workers") == []
    assert os.listdir(run_folder / "sockets") == []


async def test_two_processes_hand_over(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    await asyncio.gather(start_process("p"), start_process("d"))
    await peer.find(run_folder, "p")
    await peer.find(run_folder, "d")
    tokens, leg = await hand_over(peer, list(range(20, 40)))
    assert tokens == expected_tokens(list(range(20, 40)), 5)
    stats = peer.outputs[leg][0].stats
    assert stats is not None
    assert stats.transferred_token_count == 20
    await eventually(lambda: "p" in peer.loads and peer.loads["p"].leased_block_count == 0)


async def test_a_killed_worker_leaves_the_registry_and_the_next_life_takes_its_name(
    start_process: ProcessStarter, peer: Peer, run_folder: Path
) -> None:
    process = await start_process()
    first = await peer.find(run_folder)
    process.kill()
    await process.wait()
    assert Registry(run_folder).entries() == []
    await start_process()
    second = await peer.find(run_folder)
    assert second.epoch > first.epoch
    await peer.last(peer.submit("w", [1, 2]))


async def test_a_later_signal_ends_at_once(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    process = await start_process()
    await peer.find(run_folder)
    peer.submit("w", [NEVER_ANSWER])
    await peer.client.ask("w", Question.STATUS)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same wish, sent twice
    registry = Registry(run_folder)
    await eventually(lambda: [entry.is_draining for entry in registry.entries()] == [True])
    await asyncio.sleep(1.1)
    assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    code, errors = await ended(process)
    assert code == 70
    assert "a second time" in errors
    assert os.listdir(run_folder / "workers") == []
    assert os.listdir(run_folder / "sockets") == []


async def test_a_signal_while_loading_ends_at_once(start_process: ProcessStarter, run_folder: Path) -> None:
    process = await start_process(model="slow-to-load")
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        while b"loading slow-to-load" not in (line := await process.stderr.readline()):
            assert line, f"it ended instead of loading, with {await process.wait()}"
    process.send_signal(signal.SIGTERM)
    code, _ = await ended(process)
    assert code == -signal.SIGTERM
    assert Registry(run_folder).entries() == []
    assert os.listdir(run_folder / "workers") == []


@pytest.mark.parametrize(
    ("model", "flags", "code", "message"),
    [
        ("missing", (), 1, "there is no folder 'missing' with a model"),
        ("broken", (), 70, "a bug while loading"),
        ("fake", ("--engine", "nonsense"), 1, "there is no engine 'nonsense'"),
        ("fake", ("--lora", "a=/x"), 1, "did not take the LoRA adapter 'a'"),
        ("fake", ("--engine", "no.such:module"), 1, "cannot be imported"),
        ("fake", ("--worker-id", "../x"), 1, "is not usable"),
        ("fake", ("--block-size", "0"), 2, "--block-size: 0 is not a positive number"),
        ("fake", ("--max-running", "many"), 2, "--max-running: invalid whole number value: 'many'"),
        ("fake", ("--role", "boss"), 2, "--role: invalid choice: 'boss'"),
        ("fake", ("--drain-timeout-s", "-1"), 2, "--drain-timeout-s"),
    ],
)
async def test_what_is_wrong_is_said_in_one_line(
    start_process: ProcessStarter, run_folder: Path, model: str, flags: tuple[str, ...], code: int, message: str
) -> None:
    found, errors = await ended(await start_process(model=model, flags=flags))
    assert found == code, errors
    assert message in errors
    if code == 1:
        assert "Traceback" not in errors
        assert sum(" ERROR " in line for line in errors.splitlines()) == 1
    assert Registry(run_folder).entries() == []


async def test_a_second_process_of_the_same_name_is_refused(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    await start_process()
    await peer.find(run_folder)
    code, errors = await ended(await start_process())
    assert code == 1
    assert "a worker with the id 'w' runs already" in errors
    await peer.last(peer.submit("w", [1, 2]))


async def test_an_engine_that_breaks_ends_the_process_for_the_supervisor_to_start_again(
    start_process: ProcessStarter, peer: Peer, run_folder: Path
) -> None:
    process = await start_process()
    await peer.find(run_folder)
    last = await peer.last(peer.submit("w", [CRASH_THE_LOOP]))
    assert last.failure is not None
    assert last.failure.is_retryable
    code, errors = await ended(process)
    assert code == 70
    assert "a bug in the engine's loop" in errors


SUPERVISOR = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


async def test_a_worker_ends_with_its_killed_supervisor(peer: Peer, run_folder: Path) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SUPERVISOR, sys.executable, "-m", "polyphase.worker", "--run-folder", str(run_folder)),
        *("--worker-id", "w", "--engine", "tests.unit.worker.fake_engine:load", "--model", "fake"),
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert supervisor.stdout is not None
    worker_pid = int(await supervisor.stdout.readline())
    try:
        await peer.find(run_folder)
    finally:
        supervisor.kill()
        await supervisor.wait()
    await eventually(lambda: not is_running(worker_pid), timeout_s=30)
    assert os.listdir(run_folder / "workers") == []
    assert os.listdir(run_folder / "sockets") == []


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_help_and_flags_need_no_engine() -> None:
    script = (
        "import sys; from polyphase.worker.options import parse_options; import polyphase.worker.__main__;"
        "o = parse_options(['--run-folder','/x','--worker-id','a','--model','m','--lease-s','2.5','--kv-bytes','4096']);"
        "assert o.engine_options.lease_s == 2.5 and o.engine_options.kv_bytes == 4096 and o.engine_options.max_running is None;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
    code, errors = await ended(process)
    assert code == 0, errors


async def test_several_workers_of_one_process_serve_and_leave_together(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    process = await start_process("w", flags=("--beside", "v,u"))
    entries = [await peer.find(run_folder, name) for name in ("w", "v", "u")]
    assert {entry.pid for entry in entries} == {process.pid}
    assert len({entry.request_endpoint for entry in entries}) == 3
    request_ids = [peer.submit(name, [1, place], max_tokens=5) for place, name in enumerate(("w", "v", "u"))]
    for place, request_id in enumerate(request_ids):
        assert (await peer.last(request_id)).finish_reason is FinishReason.LENGTH
        assert peer.tokens(request_id) == expected_tokens([1, place], 5)
    process.send_signal(signal.SIGTERM)
    code, errors = await ended(process)
    assert code == 0, errors
    assert os.listdir(run_folder / "workers") == []
    assert os.listdir(run_folder / "sockets") == []


async def test_a_name_that_is_taken_is_refused_also_beside_another(start_process: ProcessStarter, peer: Peer, run_folder: Path) -> None:
    await start_process("v")
    await peer.find(run_folder, "v")
    code, errors = await ended(await start_process("w", flags=("--beside", "v")))
    assert code == 1
    assert "v" in errors
    assert os.listdir(run_folder / "workers") == ["v.json"]


async def test_a_full_disk_is_told_in_one_sentence(start_process: ProcessStarter, run_folder: Path) -> None:
    """So full that nothing can be written to the registry; whoever started the worker may start it again later."""
    code, errors = await ended(await start_process(model="full-disk"))
    assert code == 70, errors
    assert "Traceback" not in errors
    assert f"it can be started again when there is room: {run_folder}" in errors
