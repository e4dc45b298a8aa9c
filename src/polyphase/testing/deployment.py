"""A real local deployment as a child process: `polyphase serve`, in a run folder of its own, on a free loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from polyphase.core.errors import PolyphaseError
from polyphase.runtime.registry import Registry
from polyphase.wire.cards import WorkerEntry

POLL_S = 0.02


class DeploymentFailed(PolyphaseError):
    """The deployment did not get where it should in time; the message ends with its output."""

    code = "deployment_failed"
    stage = "testing"


def free_port() -> int:
    """A loopback TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports(count: int) -> range:
    """So many in a row. Raises: OSError if there are none to be found."""
    for _ in range(100):
        ports = range(first := free_port(), first + count)
        if ports[-1] < 65536 and all(_is_free(port) for port in ports[1:]):
            return ports
    raise OSError(f"no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Deployment:
    """`polyphase serve MODEL OPTIONS…` between `with` and its end.

        with Deployment("demo", "--prefill", "1", "--decode", "2") as served:
            httpx.get(f"{served.url}/v1/models")

    Owner: the `with` block; at its end the deployment is told to stop (SIGTERM) and killed if it does not.
    """

    def __init__(
        self,
        model: str | Path | None,
        *options: str,
        start_timeout_s: float = 120,
        environment: Mapping[str, str] | None = None,
        frontends: int = 1,
    ) -> None:
        """`model`: None where a file of `--config` names the models."""
        ports = free_ports(frontends)
        self.port = ports[0]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.url = self.urls[0]
        self.home = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))  # short: socket paths end at about 100 bytes
        named = () if model is None else (str(model),)
        self._command = [sys.executable, "-m", "polyphase", "serve", *named, "--port", str(self.port), *options]
        if frontends > 1:
            self._command += ["--frontends", str(frontends)]
        self._environment = {**os.environ, **(environment or {}), "XDG_RUNTIME_DIR": str(self.home), "NO_COLOR": "1"}
        self._start_timeout_s = start_timeout_s
        self._output = self.home / "serve.out"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def keep_temporary_files(self) -> None:
        """From the next start on, temporary files are made in a folder of `home`, so that one can see what is left of them."""
        folder = self.home / "tmp"
        folder.mkdir(exist_ok=True)
        self._environment["TMPDIR"] = str(folder)

    def launch(self) -> None:
        """Start the process and return at once."""
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start and wait until it says that it is ready. Raises: DeploymentFailed."""
        began = time.monotonic()
        self.launch()
        try:
            self.wait_for(self._is_ready, "it to be ready", self._start_timeout_s)
        except BaseException:
            self.kill()
            shutil.rmtree(self.home, ignore_errors=True)
            raise
        self.ready_s = time.monotonic() - began

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise DeploymentFailed(f"the deployment ended with exit code {self.process.returncode}:\n{self.output()[-4000:]}")
        return "Ready" in self.output()

    @contextmanager
    def joined(self, model: str | Path, *options: str) -> Iterator[subprocess.Popen[str]]:
        """`polyphase join MODEL OPTIONS…` from when its workers are ready to the end of the `with`. Raises: DeploymentFailed."""
        process = self.command("join", str(model), *options)
        assert process.stdout is not None
        try:
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("Ready"):
                    break
            else:
                raise DeploymentFailed(f"the workers did not join; exit code {process.wait()}:\n{said}")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)

    def command(self, *words: str) -> subprocess.Popen[str]:
        """`polyphase WORDS…` beside this deployment, its output and errors in one pipe. Owner: the caller."""
        return subprocess.Popen(
            [sys.executable, "-m", "polyphase", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        """All that the supervisor has printed."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def logs(self) -> str:
        """The logs of all processes, one after the other."""
        return "\n".join(f"=== {path.name}\n{path.read_text(errors='replace')}" for path in sorted(self.home.rglob("*.log")))

    @property
    def run_folder(self) -> Path:
        """The folder that holds registry and sockets. Raises: DeploymentFailed while there is none."""
        for workers in self.home.rglob("workers"):
            return workers.parent
        raise DeploymentFailed(f"no run folder under {self.home}:\n{self.output()[-4000:]}")

    def workers(self) -> dict[str, WorkerEntry]:
        """Living workers by id, from the registry."""
        return {entry.worker_id: entry for entry in Registry(self.run_folder).entries()}

    def frontend_pids(self) -> dict[str, int]:
        """Living frontends' processes by URL."""
        found = {}
        for pid in self.pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if "polyphase.frontend" in words:
                found[f"http://127.0.0.1:{words[words.index('--port') + 1]}"] = pid
        return found

    def health(self) -> dict[str, Any]:
        """Body of /health, also when it says unhealthy."""
        body: dict[str, Any] = self._get("/health").json()
        return body

    def record(self, request_id: str) -> dict[str, Any]:
        """The frontend's record of one request."""
        body: dict[str, Any] = self._get(f"/debug/requests/{request_id}").raise_for_status().json()
        return body

    def _get(self, path: str) -> httpx.Response:
        # Plain HTTP on this machine: without proxies, and without reading certificates, which takes 30 ms each time.
        return httpx.get(f"{self.url}{path}", timeout=30, verify=False, trust_env=False)

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
        """Poll until `condition` gives something true, and return that. Raises: DeploymentFailed."""
        deadline = time.monotonic() + timeout_s
        while True:
            if result := condition():
                return result
            if time.monotonic() > deadline:
                raise DeploymentFailed(
                    f"waited {timeout_s:.0f} s in vain for {what}; output:\n{self.output()[-3000:]}\n{self.logs()[-6000:]}"
                )
            time.sleep(POLL_S)

    def pids(self) -> set[int]:
        """Every living process that runs with this deployment's environment, the supervisor included."""
        mark = f"XDG_RUNTIME_DIR={self.home}".encode()
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    is_ours = mark in (folder / "environ").read_bytes().split(b"\0")
                    is_zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                except (OSError, IndexError):
                    continue
                if is_ours and not is_zombie:
                    found.add(int(folder.name))
        return found

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, wait, return the exit code; kills after `timeout_s`."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DeploymentFailed(f"did not stop within {timeout_s:.0f} s of SIGTERM:\n{self.output()[-3000:]}") from None
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to every process of the deployment."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait()
