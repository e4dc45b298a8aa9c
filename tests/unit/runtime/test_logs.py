"""Log lines have one form, carry the request, and cannot be forged by what they quote."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.observe import configure_logging, current_request_id, request_context, rss_bytes, uptime_s


@pytest.fixture(autouse=True)
def _restored_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_line_names_time_level_process_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode-0")
    log = logging.getLogger("polyphase.test")
    log.debug("not shown")
    log.info("outside")
    with request_context("req-1"):
        assert current_request_id() == "req-1"
        log.warning("said %s", "a\n2026-01-01 ERROR forged")
    assert current_request_id() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    decode-0 outside", lines[0])
    assert lines[1].endswith(r"WARNING decode-0 [req-1] said a\n2026-01-01 ERROR forged")


def test_a_failure_brings_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("w", "debug")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("polyphase.test").exception("failed")
    assert "ValueError: broken" in capsys.readouterr().err


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="choose one of debug, info"):
        configure_logging("w", "loud")


def test_a_process_knows_its_memory_and_age() -> None:
    assert rss_bytes() > 1 << 20
    assert uptime_s() >= 0
