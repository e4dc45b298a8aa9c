"""Builds the optional C++ extension on the way into a wheel or an editable installation.

Where it cannot be built (no compiler, no Python headers, a compiler that fails) the package is installed without it and says so in
`polyphase doctor`. With POLYPHASE_REQUIRE_NATIVE=1 that is an error instead, for those who build wheels for others.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

EXTENSION = "polyphase.core._native"
SOURCES = ("module.cpp", "prefix_index.cpp", "block_copy.cpp", "block_copy_binding.cpp", "block_stream.cpp", "xxh3_wide.cpp")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        try:
            built = _compile(Path(self.root))
        except Exception as error:  # whatever fails, the package works without
            if os.environ.get("POLYPHASE_REQUIRE_NATIVE") == "1":
                raise
            self.app.display_warning(f"The C++ extension was not built; the Python implementations are used instead. ({error!r})")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"][str(built)] = f"polyphase/core/{built.name}"


def _compile(root: Path) -> Path:
    """Into the source tree, where an editable installation finds it. Returns the file."""
    from pybind11.setup_helpers import Pybind11Extension
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    name = EXTENSION.rpartition(".")[2] + str(sysconfig.get_config_var("EXT_SUFFIX"))
    folder = root / "src" / Path(*EXTENSION.split(".")[:-1])
    for stale in folder.glob("_native*.so"):
        if stale.name == name:
            stale.unlink()  # a failed build leaves none of the source before
    sources = [str(root / "native" / source) for source in SOURCES]
    # Without contraction a score is the same number as in Python.
    flags = ["-O3", "-ffp-contract=off", *os.environ.get("POLYPHASE_NATIVE_FLAGS", "").split()]
    extension = Pybind11Extension(EXTENSION, sources, include_dirs=[str(root / "native")], cxx_std=17, extra_compile_args=flags)
    command = build_ext(Distribution({"name": "polyphase", "ext_modules": [extension]}))
    command.build_lib = str(root / "src")
    command.build_temp = str(root / "build" / "native")
    command.ensure_finalized()
    command.run()
    return folder / name
