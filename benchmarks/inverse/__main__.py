"""`python -m benchmarks.inverse`: run what is missing, then print the tables."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from pathlib import Path

import torch

from benchmarks.inverse.methods import Method, ours
from benchmarks.inverse.problems import CELLS
from benchmarks.inverse.records import DEFAULT, Records
from benchmarks.inverse.run import Runner
from benchmarks.inverse.speed_table import show_speed
from benchmarks.inverse.table import show


def peers() -> list[Method]:
    """Methods of the packages that are installed; the others are named."""
    found: list[Method] = []
    if importlib.util.find_spec("deepinv"):
        from benchmarks.inverse import peers_deepinv

        found += peers_deepinv.methods()
    if importlib.util.find_spec("azula"):
        from benchmarks.inverse import peers_azula

        found += peers_azula.methods()
    for package in ("deepinv", "azula"):
        if not any(m.package == package for m in found):
            print(f"{package} is not installed here: `make bench-inverse` makes an environment that has it")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="*", default=list(range(len(CELLS))), help="some of the cells")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after so many minutes")
    parser.add_argument("--results", type=Path, default=DEFAULT)
    parser.add_argument("--show", action="store_true", help="print what is on file, run nothing")
    parser.add_argument("--speed", type=int, nargs="?", const=5, default=0, help="the speed table, from so many pairs")
    parser.add_argument("--compiled", action="store_true", help="in it, ours also with the network compiled: minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.speed:
        show_speed(options.speed, compiled=options.compiled)
        return
    methods = peers()
    runner = Runner(Records(options.results), until=time.time() + 60 * options.minutes)
    cells = [CELLS[i] for i in options.cells]
    if not options.show:
        for cell in cells:
            runner.ours(cell, ours(), first=True)
        for cell in cells:
            runner.tune(cell, methods)
            runner.peers(cell, methods)
            runner.ours(cell, ours(), first=False)
    show(runner, cells, ours(), methods)


if __name__ == "__main__":
    main()
