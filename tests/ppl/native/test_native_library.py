"""Compiling C: once for each source, with options the compiler takes, and errors that say what went wrong."""

from __future__ import annotations

import ctypes

import pytest

from ppl.native import library

SOURCE = """
#include <math.h>
#ifdef VECTOR_MATH
#error "no vector functions here"
#endif
double twice(double x) { return 2 * x; }
"""


def test_options_that_fail_give_way_to_simpler_ones(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})
    loaded = library.load(SOURCE)
    loaded.twice.restype, loaded.twice.argtypes = ctypes.c_double, [ctypes.c_double]
    assert loaded.twice(1.5) == 3.0
    assert library.load(SOURCE) is loaded


def test_source_that_is_wrong_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})
    with pytest.raises(OSError, match="C compiler failed"):
        library.load("this is no C")


def test_compiler_of_the_environment_comes_first(monkeypatch, tmp_path):
    own = tmp_path / "mycc"
    own.write_text("#!/bin/sh\nexit 1\n")
    own.chmod(0o755)
    monkeypatch.setenv("CC", str(own))
    assert library.compiler() == str(own)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.compiler() != "no-such-compiler"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC")
    assert library.compiler() is None


def test_endless_compilation_is_given_up(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})

    def run(line, **options):
        raise library.subprocess.TimeoutExpired(line, options["timeout"])

    monkeypatch.setattr(library.subprocess, "run", run)
    with pytest.raises(OSError, match="more than 300 s"):
        library.load("int x;")
