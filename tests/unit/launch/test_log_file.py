from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyphase.launch.log_file import LogFile, last_error_of, message_of
from polyphase.observe.logs import _LineFormatter

INFO = "2026-01-31 12:00:00.123 INFO    decode-0 [chatcmpl-6f] finished: length, 32 tokens"
ERROR = "2026-01-31 12:00:01.123 ERROR   decode-0 there is no model folder /x"


@pytest.mark.parametrize(
    ("line", "message"),
    [(INFO, "finished: length, 32 tokens"), (ERROR, "there is no model folder /x"), ("  Segmentation fault ", "Segmentation fault")],
)
def test_message_without_time_and_name(line: str, message: str):
    assert message_of(line) == message


def test_understands_what_our_processes_write():
    import logging

    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "the %s is gone", ("weight",), None)
    line = _LineFormatter("decode-0").format(record)
    assert last_error_of([line, INFO]) == "the weight is gone"


def test_the_last_error_counts_else_the_last_line():
    assert last_error_of([ERROR, INFO]) == "there is no model folder /x"
    assert last_error_of(["Traceback (most recent call last):", "  File x", "ValueError: bad"]) == "ValueError: bad"
    assert last_error_of([]) == ""


def test_a_progress_bar_is_its_latest_state(tmp_path: Path):
    log = LogFile(tmp_path / "w.log")
    log.path.write_bytes(b"loading\n 10%|#   |\r 50%|##  |\r 90%|### |\n\n")
    assert log.lines() == ["loading", " 90%|### |"]


def test_a_missing_log_says_nothing(tmp_path: Path):
    log = LogFile(tmp_path / "none.log")
    assert (log.lines(), log.last_message(), log.last_error()) == ([], "", "")
    log.trim()


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    log = LogFile(tmp_path / "w.log")
    log.path.write_text("x\n" * 100_000 + "last\n")
    assert log.last_message() == "last"
    assert len(log.lines()) < 10_000


def test_a_log_is_cut_while_its_process_goes_on_writing(tmp_path: Path):
    log = LogFile(tmp_path / "w.log")
    output = log.open_for_process()
    os.write(output, b"a" * 100)
    log.trim(max_bytes=200)
    assert log.path.stat().st_size == 100
    os.write(output, b"b" * 200)
    log.trim(max_bytes=200)
    os.write(output, b"c")
    os.close(output)
    assert log.path.read_bytes() == b"c"
    assert (tmp_path / "w.log.1").stat().st_size == 300
