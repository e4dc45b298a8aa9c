"""A second host beside this one: a network namespace at the other end of a cable, or, where that is forbidden, another loopback address."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class LoopbackHosts:
    """Two addresses of this machine. The cable cannot be cut."""

    here, there, prefix = "127.0.0.1", "127.0.0.2", []
    cable: str | None = None

    def received_bytes(self) -> int | None:
        return None


class CabledHosts:
    """This host, and a network namespace that holds nothing but a veth link to it; it ends with its one process."""

    def __init__(self) -> None:
        """Raises: OSError or CalledProcessError if we may not do this."""
        number = os.getpid() % 16000  # several test runs may go on at the same time
        first, second = 64 + number // 64 // 4 % 64, number % 64 * 4
        self.here, self.there = f"10.203.{first}.{second + 1}", f"10.203.{first}.{second + 2}"
        self.cable = f"pp{os.getpid()}"[:15]
        self._holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert self._holder.stdout is not None
            if self._holder.stdout.readline() != b"\n":
                raise OSError("no network namespace may be made here")
            self.prefix = ["nsenter", "--net", "--target", str(self._holder.pid)]
            _run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid))
            _run("ip", "address", "add", f"{self.here}/30", "dev", self.cable)
            _run("ip", "link", "set", self.cable, "up")
            _run(*self.prefix, "ip", "address", "add", f"{self.there}/30", "dev", "eth0")
            _run(*self.prefix, "ip", "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def received_bytes(self) -> int | None:
        """From there, over the cable, since it was laid."""
        return int(Path(f"/sys/class/net/{self.cable}/statistics/rx_bytes").read_text())

    def close(self) -> None:
        self._holder.communicate()  # its input ends, and so does it; the link ends with the namespace
        assert self._holder.returncode is not None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[CabledHosts | LoopbackHosts]:
    try:
        hosts = CabledHosts()
    except (OSError, subprocess.CalledProcessError):
        yield LoopbackHosts()
        return
    try:
        yield hosts
    finally:
        hosts.close()


@contextmanager
def processes(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start(name, command)`; each writes `name.log` in the folder, and all are told to end, and killed if they do not."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
