#!/bin/sh
# Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests.
#
# Usage: csrc/sanitize.sh [pytest arguments]      PYTHON=... chooses the interpreter.
# The library of the source tree is put back at the end.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
library=src/normkit/kernels/cpu/_C.so
work=$(mktemp -d)
[ -f "$library" ] && cp "$library" "$work/before.so"
restore() {
    if [ -f "$work/before.so" ]; then cp "$work/before.so" "$library"; else rm -f "$library"; fi
    rm -rf "$work"
}
trap restore EXIT

NORMKIT_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    "$python" setup.py -q build_ext -b "$work/out" -t "$work/objects"
cp "$work/out/normkit/kernels/cpu/_C.so" "$library"
# Leaks are Python's own; torch's threads and allocator are not instrumented.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    "$python" -m pytest tests/kernels/cpu -q -p no:cacheprovider "$@"
