from __future__ import annotations

import subprocess
import sys

from polyphase.core import native

SCRIPT = """
import sys
sys.modules["polyphase.core._native"] = {stand_in}
from polyphase.core import native, hashing
from polyphase.router.indexes import default_index
print(native.is_native(), type(default_index()).__name__, hashing.sequence_hashes(list(range(32)), 16), native.status())
"""


def run(stand_in: str) -> str:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(stand_in=stand_in)], capture_output=True, text=True, check=True).stdout


def test_status_says_which():
    assert native.status().startswith("native: " if native.is_native() else "pure Python: ")


def test_without_the_extension_python_serves():
    told = run("None")
    assert told.startswith("False NaivePrefixIndex [")
    assert "pure Python" in told


def test_an_extension_of_another_version_is_not_used():
    told = run("__import__('types').SimpleNamespace(RECIPE=-1, __file__='old.so')")
    assert told.startswith("False NaivePrefixIndex [")
    assert "old.so was built from other source (-1, not 5)" in told
