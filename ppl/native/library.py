"""Compile C source with the machine's compiler and load it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["compiler", "load"]

TIMEOUT = 300.0  # seconds
_QUICK = ("-O1", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
# The first that works; the vector forms of exp, log, ... come with the C library of Linux on x86.
_OPTIONS = (
    ("-march=native", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-DVECTOR_MATH"),
    ("-march=native", "-ftree-vectorize"),
    (),
)
_loaded: dict[str, ctypes.CDLL] = {}


def compiler() -> str | None:
    """The C compiler: $CC, or the first of cc, gcc and clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


def load(source: str) -> ctypes.CDLL:
    """A library compiled from C source; the same source is compiled once in a process.

    Raises:
        OSError: there is no compiler, or it does not take the source.
    """
    if source in _loaded:
        return _loaded[source]
    command = compiler()
    if command is None:
        raise OSError("no C compiler was found")
    with tempfile.TemporaryDirectory(prefix="ppl-native-") as folder:
        code, library = Path(folder) / "density.c", Path(folder) / "density.so"
        code.write_text(source)
        said = ""
        for options in _OPTIONS:
            line = [command, *_QUICK, *options, "-shared", "-fPIC", "-o", str(library), str(code), "-lm"]
            try:
                done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                raise OSError(f"the C compiler took more than {TIMEOUT:g} s") from None
            if done.returncode == 0:
                try:
                    _loaded[source] = ctypes.CDLL(str(library))
                except OSError as error:
                    said = str(error)
                    continue
                return _loaded[source]
            said = done.stderr
    raise OSError(f"the C compiler failed: {said[:300]}")
