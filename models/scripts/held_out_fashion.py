"""Pick the Fashion-MNIST test images that come with the package: `python -m models.scripts.held_out_fashion`.

The first test images of each class, in rounds over the classes, kept as bytes with the licence text beside them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from models.data import FASHION_CLASSES, FASHION_FOLDER, fashion_mnist

__all__ = ["main"]

_LICENCE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated \
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the \
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit \
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the \
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE \
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR \
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR \
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main(count: int = 32, folder: Path = FASHION_FOLDER) -> None:
    """Write weights/fashion28x28_held_out.safetensors, .json and .LICENSE."""
    from safetensors.torch import save

    data = fashion_mnist(folder)
    by_class = [torch.nonzero(data.held_out_label == c)[:, 0] for c in range(len(FASHION_CLASSES))]
    index = torch.tensor([int(by_class[i % 10][i // 10]) for i in range(count)])
    images = data.held_out[index].add(1).mul(127.5).round().to(torch.uint8)
    raw = save({"images": images, "labels": data.held_out_label[index].to(torch.uint8), "index": index})
    place = Path(__file__).parents[1] / "weights"
    (place / "fashion28x28_held_out.safetensors").write_bytes(raw)
    facts = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "what": f"{count} Fashion-MNIST test images as bytes; index is their place in the test set",
        "licence": data.licence,
        "source": "https://github.com/zalandoresearch/fashion-mnist",
        "script": "python -m models.scripts.held_out_fashion",
    }
    (place / "fashion28x28_held_out.json").write_text(json.dumps(facts, indent=2) + "\n")
    (place / "fashion28x28_held_out.LICENSE").write_text(_LICENCE)


if __name__ == "__main__":
    main()
