"""The command line of SGLang's server, what a start and an end say of themselves, and what a server tells of itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polyphase.config import ServeSettings
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.served.launching import free_ports, unknown_flags
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.sglang.assembly import load_sglang_engines
from polyphase.engines.sglang.flags import api_key, environment, last_words, progress_of, serve_command
from polyphase.engines.sglang.load import gauges_of, gauges_of_old
from polyphase.engines.sglang.probe import facts_of
from polyphase.launch.model_source import resolve_model
from polyphase.wire.cards import Role
from tests.unit.sglang.double import HALVES, Recording
from tests.unit.sglang.test_engine import facts_in

DEMO = resolve_model("demo").location


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(**{"model": "/models/m", "name": "m", "folder": Path("/run/w"), "command": "sglang serve", **changes})


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_what_is_said_becomes_flags() -> None:
    command = serve_command(settings(block_size=32, context_length=4096, arguments="--tp-size 2"), "m", 1234, kv_tokens=8192)
    assert command[:4] == ["sglang", "serve", "--model-path", "/models/m"]
    assert (value_of(command, "--host"), value_of(command, "--port")) == ("127.0.0.1", "1234")
    assert (value_of(command, "--page-size"), value_of(command, "--context-length")) == ("32", "4096")
    assert value_of(command, "--max-total-tokens") == "8192"
    assert json.loads(value_of(command, "--kv-events-config"))["endpoint"] == "ipc:///run/w/events"
    assert command[-2:] == ["--tp-size", "2"], "last, so that they win"
    assert not {"--dtype", "--device", "--disaggregation-mode"} & set(command)


def test_adapters_go_by_name() -> None:
    command = serve_command(settings(adapters={"sql": "/a/sql", "poet": "/a/poet"}), "m", 1)
    place = command.index("--lora-paths")
    assert command[place - 1 : place + 3] == ["--enable-lora", "--lora-paths", "sql=/a/sql", "poet=/a/poet"]


def test_without_a_word_pages_are_large_enough_for_an_index() -> None:
    assert value_of(serve_command(settings(), "m", 1), "--page-size") == "16"


def test_each_half_is_told_its_own() -> None:
    prefill = serve_command(settings(role=Role.PREFILL, device="cpu"), "m", 1)
    decode = serve_command(settings(role=Role.DECODE, device="cpu"), "m", 1)
    assert (value_of(prefill, "--disaggregation-mode"), value_of(decode, "--disaggregation-mode")) == ("prefill", "decode")
    assert int(value_of(prefill, "--disaggregation-bootstrap-port")) > 0
    assert "--disaggregation-bootstrap-port" not in decode
    assert "--disaggregation-transfer-backend" not in serve_command(settings(role=Role.DECODE), "m", 1), "on accelerators, SGLang's choice"


@pytest.mark.parametrize("written", ["--dp-size 2", "--dp=2", "--data-parallel-size 2"])
def test_events_of_several_ranks_have_ports_in_a_row(written: str) -> None:
    config = json.loads(value_of(serve_command(settings(arguments=written), "m", 1), "--kv-events-config"))
    ports = [int(config[name].rpartition(":")[2]) for name in ("endpoint", "replay_endpoint")]
    assert config["bind"] is True
    assert ports[1] - ports[0] == 2
    assert config["endpoint"].startswith("tcp://127.0.0.1:")


def test_flags_that_a_version_does_not_know_are_left_away() -> None:
    said = ["usage: …", "launch_server.py: error: unrecognized arguments: --incremental-streaming-output --their-own=1"]
    unknown = unknown_flags(said)
    assert "--incremental-streaming-output" in unknown
    assert "--incremental-streaming-output" not in serve_command(settings(), "m", 1, unknown)


def test_free_ports_come_in_a_row() -> None:
    assert 1024 < free_ports(4) < 65533


def test_the_users_environment_stays() -> None:
    assert "SGLANG_HOST_IP" not in environment(settings(), {"SGLANG_HOST_IP": "10.0.0.1"})
    assert environment(settings(device="cpu"), {})["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in environment(settings(), {})


def test_the_key_of_a_launched_server_is_among_its_flags() -> None:
    assert api_key(settings(arguments="--api-key=k1", api_key="k2")) == "k1"
    assert api_key(settings(api_key="k2")) == "k2"
    assert "k2" not in repr(settings(api_key="k2"))


def test_progress_is_a_phrase() -> None:
    assert progress_of([]) == "it starts Python and imports torch"
    assert progress_of(["server_args={}", "[2026] Load weight begin. avail mem=19 GB", "something else"]) == "it loads the weights"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            "Subprocess scheduler_0 (pid=2345) crashed with exit code -9. Triggering SIGQUIT",
            "its process scheduler_0 was killed by SIGKILL",
        ),
        ("Subprocess scheduler_0 (pid=2345) crashed with exit code 1. Triggering SIGQUIT", ""),
        ("[2026-11-24] SIGQUIT received. signum=None, frame=None. It usually means one child failed.", ""),
        ("Received sigquit from a child process. It usually means the child failed.", ""),
        ("Prefill batch, #new-seq: 1", None),
    ],
)
def test_it_says_that_it_ends_before_it_has(line: str, cause: str | None) -> None:
    assert last_words(line) == cause


def ended(script: str, **options: Any) -> str:
    """What is said of a server that prints this and then stays, as SGLang does for some seconds."""
    server = ServerProcess("sglang", [sys.executable, "-u", "-c", f"{script}\nimport time\ntime.sleep(60)"], {}, last_words, **options)
    try:
        deadline_s = time.monotonic() + 60
        while not server.has_ended():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        return server.why_ended()
    finally:
        server.stop()


def test_its_end_is_explained_at_once() -> None:
    assert ended("print('Subprocess scheduler_0 (pid=1) crashed with exit code -9.')") == (
        "sglang ended: its process scheduler_0 was killed by SIGKILL"
    )
    crash = "print('IndexError: index out of range in self'); print('SIGQUIT received. signum=None')"
    assert ended(crash) == "sglang ended: IndexError: index out of range in self"


def test_secrets_are_kept_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ended("print(\"server_args={'api_key': 'sesame'}\"); print('SIGQUIT received')", secrets=("sesame",))
    assert "'api_key': '***'" in caplog.text
    assert "sesame" not in caplog.text


def test_without_sglang_it_is_said_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigurationError, match="--engine-python"):
        serve_command(settings(command=None), "m", 1)
    with pytest.raises(ConfigurationError, match="is no program"):
        serve_command(settings(command=None, python="/no/python"), "m", 1)


def test_a_start_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    broken = f"{sys.executable} -c 'raise OSError(28)'"
    with pytest.raises(ModelLoadError, match=r"sglang ended \(exit code 1\): OSError: 28"):
        load_sglang_engines(settings(model=DEMO, command=broken, folder=tmp_path / "w"))


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a server"):
        load_sglang_engines(settings(model=DEMO, attach="localhost", folder=tmp_path))


def test_what_the_real_one_tells() -> None:
    facts = facts_in(Recording())
    assert (facts.version, facts.model, facts.block_size, facts.kv_tokens, facts.mode) == ("0.5.23", "tiny", 16, 8192, "null")
    assert facts.context_length == 4090, "six tokens before the context's end SGLang refuses prompts"
    assert (facts.takes_priority, facts.is_incremental, facts.takes_grammars, facts.is_deterministic) == (True, True, True, False)
    assert facts.events is not None
    assert facts.events.is_bound
    prefill, decode = (facts_in(Recording(HALVES, half)) for half in ("prefill", "decode"))
    assert (prefill.mode, prefill.keeps_prefixes, prefill.bootstrap_port) == ("prefill", True, 7399)
    assert (decode.mode, decode.keeps_prefixes) == ("decode", False)


def test_events_that_go_to_another_host_are_not_for_us() -> None:
    info: dict[str, Any] = {"max_total_num_tokens": 64, "page_size": 16}
    for endpoint, is_bound, can_be_heard in (("tcp://127.0.0.1:5557", False, True), ("tcp://10.0.0.9:5557", False, False)):
        source = facts_of({**info, "kv_events_config": json.dumps({"publisher": "zmq", "endpoint": endpoint})}, [], None).events
        assert source is not None
        assert (source.is_bound, source.can_be_heard) == (is_bound, can_be_heard)
    bound = facts_of(
        {**info, "kv_events_config": '{"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5567"}'}, [], None
    )
    assert bound.events is not None
    assert (bound.events.of_rank(1).endpoint, bound.events.of_rank(1).replay_endpoint) == ("tcp://*:5558", "tcp://*:5568")


def test_load_of_the_real_one_and_of_older_ones() -> None:
    page = json.dumps(Recording().pages["/v1/loads"]).encode()
    gauges = gauges_of(page)
    assert gauges.iterations > 50
    assert (gauges.running_count, gauges.waiting_count) == (0, 0)
    old = gauges_of_old(b'[{"dp_rank":0,"num_reqs":5,"num_waiting_reqs":2,"num_tokens":512}]', 1024)
    assert (old.running_count, old.waiting_count, old.used_share) == (3, 2, 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "sglang", "attach": "http://x:1", "engine_python": "python"}, "runs already"),
        ({"engine": "sglung"}, "there is no engine"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServeSettings(model="demo", **changes)
