"""Parts that come from other packages: real distributions on a path, found by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyphase.config import load_serve_settings
from polyphase.config.router import parse_names, parse_pairs, parse_weights, parts_of, weights_text
from polyphase.core.errors import ConfigurationError
from polyphase.router import BUILT_IN, PolicySettings, Router, RouterSettings
from tests.unit.cli.conftest import CommandLine
from tests.unit.router.builders import facts, prefix, request

PART = """
class Alphabetical:
    unit = "letters"

    def costs(self, request, leg, workers):
        return [10.0 * (ord(view.facts.worker_id[0]) - ord("a")) for view in workers]


class Last:
    def pick(self, scores, workers, turn):
        return len(scores) - 1


def last(temperature):
    return Last()
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A distribution as pip would leave it."""

    def put(name: str, source: str, **points: str) -> None:
        site = tmp_path / name
        module = name.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{point.replace('_', '-')} = {module}:{target}" for point, target in points.items()]
        (info / "entry_points.txt").write_text("[polyphase.router.parts]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_an_installed_part_routes(install: Install):
    install("letters-part", PART, letters="Alphabetical", the_last="last")
    policy = PolicySettings(weights={"letters": 1000.0})
    router = Router(RouterSettings(policy), parts=parts_of(policy))
    for name in "cab":
        router.upsert_worker(facts(name))
    assert {router.route(request(str(n), prefix(n, 4))).decode.worker_id for n in range(5)} == {"a"}
    costs = dict(router.route(request("x", prefix(9, 4))).decode.candidates[-1].costs)
    assert costs["letters"] == 20_000
    picked = PolicySettings(picker="the-last")
    router = Router(RouterSettings(picked), parts=parts_of(picked))
    for name in "cab":
        router.upsert_worker(facts(name))
    assert router.route(request()).decode.worker_id == "c"


def test_settings_may_name_it_and_the_list_shows_it(install: Install, polyphase: CommandLine):
    install("letters-part", PART, letters="Alphabetical")
    settings = load_serve_settings({"model": "demo", "router_weights": "letters=3"}, {})
    assert settings.router_policy == PolicySettings(weights={"letters": 3.0})
    listed = polyphase("router", "parts")
    assert listed.exit_code == 0
    assert "letters_part:Alphabetical" in listed.output


def test_what_is_not_named_is_not_imported(install: Install):
    install("broken-part", "raise RuntimeError('at import')", broken="Thing")
    assert parts_of(PolicySettings(weights={"queued": 1.0})) is BUILT_IN


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "broken-part 1.0.* cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "broken-part 1.0.* cannot be loaded: AttributeError"),
        ("class Thing:\n    def __init__(self, needed): pass", "cannot be loaded: TypeError"),
        ("Thing = 5", "is of the type int, which is no scorer"),
    ],
)
def test_a_broken_part_is_told_with_its_package(install: Install, source: str, message: str):
    install("broken-part", source, broken="Thing")
    with pytest.raises(ConfigurationError, match=message):
        parts_of(PolicySettings(weights={"broken": 1.0}))


def test_two_packages_with_one_name(install: Install):
    install("one-part", PART, letters="Alphabetical")
    install("other-part", PART, letters="Alphabetical")
    with pytest.raises(ConfigurationError, match=r"one-part 1.0 and other-part 1.0 both offer a router part 'letters'"):
        parts_of(PolicySettings(weights={"letters": 1.0}))


def test_a_slip_of_the_pen_is_told_the_nearest_name_of_other_packages_too(install: Install):
    install("letters-part", PART, letters="Alphabetical")
    with pytest.raises(ConfigurationError, match="no router scorer 'leters'; did you mean letters"):
        parts_of(PolicySettings(weights={"leters": 1.0}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uncached=2,requests=50", {"uncached": 2.0, "requests": 50.0}),
        (" uncached = 2.5 , ", {"uncached": 2.5}),
        ({"uncached": 2, "x": "3"}, {"uncached": 2.0, "x": 3.0}),
        ("", {}),
        ("uncached", None),
        ("uncached=", None),
        ("uncached=two", None),
        ("uncached=1,uncached=2", None),
        ({"uncached": True}, None),
        ({"uncached": [1]}, None),
        (7, None),
    ],
)
def test_weights(given: object, expected: dict[str, float] | None):
    if expected is None:
        with pytest.raises(ValueError, match=r"write for example|twice"):
            parse_weights(given)
    else:
        assert parse_weights(given) == expected
        assert parse_weights(weights_text(expected)) == expected


def test_names_and_pairs():
    assert parse_names("a, b,") == parse_names(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match="are no names"):
        parse_names([1])
    with pytest.raises(ValueError, match="for example zone=x"):
        parse_pairs("zone", "labels", "zone=x")
