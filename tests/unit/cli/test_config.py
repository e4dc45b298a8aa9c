"""What people write, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.config import ServeSettings, format_bytes, load_serve_settings, parse_duration_s, parse_size_bytes
from polyphase.core.errors import ConfigurationError
from polyphase.router import PolicySettings
from polyphase.router.tenants import format_tenant_weights, parse_tenant_weights


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 1024**3),
        ("2 GiB", 2 * 1024**3),
        ("1.5gib", 3 * 1024**3 // 2),
        ("500MB", 500_000_000),
        ("512M", 512 * 1024**2),
        ("64k", 65536),
        ("1_000", None),
        ("1500000000", 1_500_000_000),
        (4096, 4096),
        ("0.5TiB", 1024**4 // 2),
        ("", None),
        ("GiB", None),
        ("-1GiB", None),
        ("2 XB", None),
        ("1e9", None),
        ("2GiB 3", None),
        (None, None),
        (True, None),
        ("٢GiB", None),
    ],
)
def test_sizes(text: str, expected: int | None):
    if expected is None:
        with pytest.raises(ValueError, match=r"is not a size.*for example 2GiB"):
            parse_size_bytes(text)
    else:
        assert parse_size_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30s", 30), ("500ms", 0.5), ("2min", 120), ("2 m", 120), ("1h", 3600), ("1.5", 1.5), (7, 7), ("0", 0), ("1 year", None), ("s", None)],
)
def test_durations(text: str | int, expected: float | None):
    if expected is None:
        with pytest.raises(ValueError, match=r"is not a duration.*for example 30s"):
            parse_duration_s(text)
    else:
        assert parse_duration_s(text) == expected


@given(st.integers(0, 2**60))
def test_a_plain_number_of_bytes_is_itself(size: int):
    if size < 2**53:
        assert parse_size_bytes(str(size)) == size
    assert format_bytes(size)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_clear_error(text: str):
    try:
        size = parse_size_bytes(text)
    except ValueError as error:
        size = 0 if "for example" in str(error) else -1
    assert size >= 0


@pytest.mark.parametrize(
    ("size", "text"), [(17, "17 B"), (2048, "2.0 KiB"), (327680, "320 KiB"), (3 * 1024**3 // 2, "1.5 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_for_people(size: int, text: str):
    assert format_bytes(size) == text


def test_nearer_sources_win(tmp_path: Path):
    file = tmp_path / "serve.toml"
    file.write_text('model = "filed"\nport = 1111\nhost = "0.0.0.0"\nkv-memory = "64MiB"\n')
    environment = {"POLYPHASE_PORT": "2222", "POLYPHASE_POLICY": "least-loaded", "POLYPHASE_NAME": "", "UNRELATED": "x"}
    settings = load_serve_settings({"model": "demo", "port": None, "policy": "round-robin"}, environment, file)
    assert settings.model == "demo"
    assert settings.port == 2222
    assert settings.policy == "round-robin"
    assert settings.host == "0.0.0.0"
    assert settings.kv_memory == 64 * 1024**2
    assert settings.name == "default"


def test_a_router_section(tmp_path: Path):
    file = tmp_path / "serve.toml"
    file.write_text(
        '[router]\npolicy = "least-loaded"\ntemperature = 0.5\nweights = { requests = 5, uncached = 1.5 }\nsession-idle = "2min"\n'
        "split_threshold = 7\n"
    )
    settings = load_serve_settings({"model": "demo", "policy": "kv"}, {"POLYPHASE_SPLIT_FRACTION": "0.5"}, file)
    assert settings.router_policy == PolicySettings("kv", {"requests": 5.0, "uncached": 1.5}, 0.5)
    assert (settings.session_idle, settings.split_threshold, settings.split_fraction) == (120, 7, 0.5)
    file.write_text('labels = { zone = "eu-1" }\n')
    assert load_serve_settings({"model": "demo"}, {}, file).labels == {"zone": "eu-1"}


def test_a_nearer_choice_of_roles_replaces_a_farther_one_whole(tmp_path: Path):
    file = tmp_path / "serve.toml"
    file.write_text("prefill = 1\ndecode = 2\n")
    settings = load_serve_settings({"model": "demo", "workers": 3}, {}, file)
    assert (settings.workers, settings.prefill, settings.decode) == (3, None, None)
    settings = load_serve_settings({"model": "demo"}, {"POLYPHASE_WORKERS": "2"}, file)
    assert (settings.workers, settings.prefill) == (2, None)


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ({"model": "demo", "port": "x"}, {}, "--port 'x' should be a valid integer"),
        ({"model": "demo", "port": 70000}, {}, "--port 70000 should be less than or equal to 65535"),
        ({"model": "demo"}, {"POLYPHASE_PORT": "0"}, "POLYPHASE_PORT '0' should be greater"),
        ({"model": "demo", "kv_memory": "2 XB"}, {}, "--kv-memory: '2 XB' is not a size"),
        ({"model": "demo", "kv_memory": "12"}, {}, "--kv-memory '12' is too small"),
        ({"model": "demo", "policy": "best"}, {}, "no router policy 'best'; choose one of kv, least-loaded, round-robin"),
        ({"model": "demo", "router_weights": "queue=1"}, {}, "no router scorer 'queue'; did you mean queued"),
        ({"model": "demo", "router_weights": "queued"}, {}, "--router-weights: 'queued' are no weights; write for example uncached=2"),
        ({"model": "demo"}, {"POLYPHASE_ROUTER_WEIGHTS": "queued=-1"}, "the weight of 'queued' is -1.0; it must be a number from 0"),
        ({"model": "demo", "router_temperature": "warm"}, {}, "--router-temperature 'warm' should be a valid number"),
        ({"model": "demo", "router_picker": "bets"}, {}, "no router picker 'bets'; did you mean best"),
        ({"model": "demo", "router_filters": "ful"}, {}, "no router filter 'ful'; did you mean full"),
        ({"model": "demo", "split_fraction": "2"}, {}, "--split-fraction '2' should be less than or equal to 1"),
        ({"model": "demo", "labels": "zone"}, {}, "--labels: 'zone' are no labels; write for example zone=eu-1,rack=7"),
        ({"model": "demo", "dtype": "int8"}, {}, "--dtype 'int8' should be 'auto', 'float32'"),
        ({"model": "demo", "engine": "fast"}, {}, "--engine: there is no engine 'fast'; write torch"),
        ({"model": "demo", "name": "../x"}, {}, "--name: '../x' cannot name a deployment"),
        ({"model": " "}, {}, "MODEL ' ' is empty"),
        ({}, {}, "no model is named"),
        ({"model": "demo", "workers": 1, "decode": 1}, {}, "workers cannot be combined"),
        ({"model": "demo", "prefill": 0}, {}, "no worker is left that decodes"),
        ({"model": "demo", "decode": 0}, {}, "no worker is left that decodes"),
        ({"model": "demo", "workers": 0}, {}, "--workers 0 should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_it(flags: dict[str, object], environment: dict[str, str], sentence: str):
    with pytest.raises(ConfigurationError) as caught:
        load_serve_settings(flags, environment)
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prot = 1", "did you mean port?"),
        ("xyzzy = 1", "known are name, host"),
        ("port = ", "is not valid TOML"),
        ("port = 'x'", "should be a valid integer"),
        ("[router]\npolice = 'kv'", "sets 'router.police', which is not a setting; did you mean router.policy?"),
        ("[router]\ntemperature = 'x'", "router.temperature in"),
        ("router = 'kv'", "write it as a table, [router]"),
        ("policy = 'kv'\n[router]\npolicy = 'kv'", "sets both router.policy and policy, which are the same"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str | bytes, sentence: str):
    file = tmp_path / "serve.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as caught:
        load_serve_settings({"model": "demo"}, {}, file)
    assert sentence in caught.value.message
    assert str(file) in caught.value.message


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="cannot read the configuration file"):
        load_serve_settings({"model": "demo"}, {}, tmp_path / "none.toml")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ServeSettings(model="demo").port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("acme=3, lab=0.5", {"acme": 3.0, "lab": 0.5}),
        ("", {}),
        ({"acme": 3, "key-0123": 0.25}, {"acme": 3.0, "key-0123": 0.25}),
        ("acme", "is not a list of tenants"),
        (7, "is not a list of tenants"),
        ("=3", "cannot be a tenant"),
        ("a b=3", "cannot be a tenant"),
        ("acme=3,acme=4", "has two weights"),
        ("acme=0", "cannot have the weight '0'"),
        ("acme=-1", "cannot have the weight"),
        ("acme=nan", "cannot have the weight"),
        ("acme=inf", "cannot have the weight"),
        ("acme=much", "cannot have the weight 'much'; write a number between 0.001 and 1000"),
        ({"acme": True}, "cannot have the weight True"),
        ({"acme": None}, "cannot have the weight None"),
    ],
)
def test_tenant_weights(given: str | dict[str, float], expected: dict[str, float] | str):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            parse_tenant_weights(given)
    else:
        weights = parse_tenant_weights(given)
        assert weights == expected
        assert parse_tenant_weights(format_tenant_weights(weights)) == weights


def test_admission_in_a_file_and_in_variables(tmp_path: Path):
    file = tmp_path / "polyphase.toml"
    file.write_text('model = "demo"\nmax_queue_wait = "2min"\n[tenant_weights]\nacme = 3\n')
    settings = load_serve_settings({}, {"POLYPHASE_MAX_QUEUED_REQUESTS": "7"}, file)
    assert (settings.max_queued_requests, settings.max_queue_wait, settings.tenant_weights) == (7, 120.0, {"acme": 3.0})
    with pytest.raises(ConfigurationError, match=r"POLYPHASE_TENANT_WEIGHTS: 'acme' cannot have the weight"):
        load_serve_settings({"model": "demo"}, {"POLYPHASE_TENANT_WEIGHTS": "acme=x"})
    with pytest.raises(ConfigurationError, match="--max-queue-wait"):
        load_serve_settings({"model": "demo", "max_queue_wait": "0"}, {})
