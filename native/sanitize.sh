#!/usr/bin/env bash
# Builds the extension with the address and undefined-behaviour sanitizers beside the source tree, and runs its tests on that build:
# those of the transfer library, the conformance kit, the state machine against the naive index, the differential hashing tests. Exits with pytest's status.
#
#   PYTHON=.venv/bin/python native/sanitize.sh [more arguments for pytest]
#
# Needs a C++ compiler with libasan and libubsan, and pybind11, numpy, pytest and hypothesis in that environment. LeakSanitizer is off:
# the interpreter itself frees nothing at exit.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-$root/.venv/bin/python}")
[[ $python == /* ]] || python=$PWD/$python
compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$root/src" "$root/tests" "$root/docs" "$root/pyproject.toml" "$work/"  # a test runs what the guide shows
find "$work/src" -name '_native*.so' -delete
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
includes=$("$python" -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"])')
echo "building with -fsanitize=address,undefined"
# shellcheck disable=SC2086
"$compiler" -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off \
    -D_GLIBCXX_ASSERTIONS -fPIC -shared -fvisibility=hidden $includes \
    "$root"/native/*.cpp -o "$work/src/polyphase/core/_native$suffix"

cd "$work"
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
    PYTHONPATH="$work/src:$work" "$python" -c 'from polyphase.core import native; print(native.status()); assert native.is_native()'
env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
    PYTHONPATH="$work/src:$work" "$python" -m pytest -p no:cacheprovider tests/unit/router tests/unit/core tests/unit/transfer "$@"
