from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.launch.run_folder import DeploymentRecord, RunFolder, base_folder, find_deployment, living_deployments


@pytest.fixture
def environment(runtime_folder: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(runtime_folder)}


def publish(folder: RunFolder, name: str) -> None:
    folder.publish(
        DeploymentRecord(
            name=name, model="demo", url="http://127.0.0.1:8000", pid=os.getpid(), run_folder=str(folder.path), worker_ids=["worker-0"],
            started_unix_s=time.time(),
        )
    )  # fmt: skip


def test_is_private_and_leaves_nothing(environment: dict[str, str], runtime_folder: Path):
    with RunFolder.claim("a", environment) as folder:
        assert folder.path == runtime_folder / "polyphase" / "a"
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert folder.logs.is_dir()
        (folder.path / "sockets").mkdir()
        (folder.path / "sockets" / "x").touch()
        publish(folder, "a")
    assert not folder.path.exists()
    folder.release()


def test_a_living_name_is_taken(environment: dict[str, str]):
    with RunFolder.claim("a", environment) as folder:
        with pytest.raises(ConfigurationError, match=r"'a' is running already; .* another --name"):
            RunFolder.claim("a", environment)
        publish(folder, "a")
        with pytest.raises(ConfigurationError, match=r"at http://127\.0\.0\.1:8000 \(pid \d+\)"):
            RunFolder.claim("a", environment)
        with RunFolder.claim("b", environment):
            pass
    with RunFolder.claim("a", environment):
        pass


def test_what_a_killed_supervisor_left_is_cleared_away(environment: dict[str, str]):
    path = base_folder(environment) / "a"
    (path / "workers").mkdir(mode=0o700, parents=True)
    path.parent.chmod(0o700)
    path.chmod(0o700)
    (path / "lock").touch()
    (path / "deployment.json").write_text("{}")
    (path / "workers" / "worker-0.json").touch()
    assert living_deployments(environment) == []
    with RunFolder.claim("a", environment) as folder:
        assert sorted(entry.name for entry in folder.path.iterdir()) == ["lock", "logs"]


def test_logs_can_be_kept(environment: dict[str, str]):
    folder = RunFolder.claim("a", environment)
    (folder.logs / "worker-0.log").write_text("why")
    folder.release(keep_logs=True)
    assert [path.name for path in folder.path.rglob("*")] == ["logs", "worker-0.log"]


def test_deployments_are_found_by_name(environment: dict[str, str]):
    with pytest.raises(ConfigurationError, match="no deployment is running"):
        find_deployment(None, environment)
    with RunFolder.claim("a", environment) as a:
        publish(a, "a")
        assert find_deployment(None, environment).name == "a"
        with RunFolder.claim("b", environment) as b:
            publish(b, "b")
            with pytest.raises(ConfigurationError, match="choose one with --name: a, b"):
                find_deployment(None, environment)
            assert find_deployment("b", environment).run_folder == str(b.path)
            with pytest.raises(ConfigurationError, match="no deployment named 'c'"):
                find_deployment("c", environment)
        assert [record.name for record in living_deployments(environment)] == ["a"]


def test_a_broken_record_is_passed_over(environment: dict[str, str]):
    with RunFolder.claim("a", environment) as folder:
        (folder.path / "deployment.json").write_text("not json")
        assert living_deployments(environment) == []


def test_without_a_usable_runtime_folder_it_is_tmp(tmp_path: Path):
    fallback = Path(f"/tmp/polyphase-{os.getuid()}")
    assert base_folder({}) == fallback
    assert base_folder({"XDG_RUNTIME_DIR": str(tmp_path / "missing")}) == fallback
    long = tmp_path / ("x" * 60)
    long.mkdir()
    assert base_folder({"XDG_RUNTIME_DIR": str(long)}) == fallback


def test_a_folder_that_others_may_enter_is_refused(environment: dict[str, str], runtime_folder: Path):
    (runtime_folder / "polyphase").mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        RunFolder.claim("a", environment)


def test_a_symbolic_link_is_refused(environment: dict[str, str], runtime_folder: Path, tmp_path: Path):
    (runtime_folder / "polyphase").symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        RunFolder.claim("a", environment)


def test_a_folder_that_cannot_be_written_to_is_said(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    def no_room(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder.claim("full", environment) as folder:
        monkeypatch.setattr(Path, "write_bytes", no_room)
        with pytest.raises(ConfigurationError, match="No space left on device"):
            publish(folder, "full")
