"""Image data in [-1, 1]: scikit-learn's digits (8 x 8), Fashion-MNIST (28 x 28) and a few held-out images of it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ppl.errors import DataError

__all__ = ["FASHION_CLASSES", "FASHION_FOLDER", "ImageData", "digits", "fashion_mnist", "held_out_fashion"]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class ImageData:
    """Images with labels, split once into a training and a held-out part.

    Args:
        name: what the data are called in files and error messages.
        train: (images, channels, height, width), float32 in data_range.
        train_label: (images,) integers.
        held_out: (held-out images, channels, height, width); never trained on.
        held_out_label: (held-out images,) integers.
        data_range: lowest and highest possible pixel value.
        classes: names of the labels.
        licence: under which the images may be used and passed on, with their author.
    """

    name: str
    train: Tensor
    train_label: Tensor
    held_out: Tensor
    held_out_label: Tensor
    data_range: tuple[float, float]
    classes: tuple[str, ...]
    licence: str

    def __post_init__(self) -> None:
        for part, label in ((self.train, self.train_label), (self.held_out, self.held_out_label)):
            if part.ndim != 4 or label.shape != part.shape[:1]:
                raise DataError(
                    f"{self.name}: expected images (n, channels, height, width) and labels (n,), "
                    f"got {tuple(part.shape)} and {tuple(label.shape)}"
                )
            low, high = self.data_range
            if part.numel() and not (float(part.min()) >= low and float(part.max()) <= high):
                raise DataError(f"{self.name}: pixels must lie in [{low}, {high}]; rescale the images first")

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.shape[1:])  # type: ignore[return-value]

    def rms(self) -> float:
        """Root mean square of the training pixels, the sigma_data of an EDM denoiser."""
        return float(self.train.double().square().mean().sqrt())

    def principal_sd(self) -> float:
        """Standard deviation of the training images along their first principal axis."""
        flat = self.train.double().flatten(1)
        covariance = torch.cov(flat.T)
        return float(torch.linalg.eigvalsh(covariance)[-1].sqrt())

    def fingerprint(self) -> str:
        """SHA-256 of the training images and labels, to tell one data set from another."""
        digest = hashlib.sha256(self.train.contiguous().numpy().tobytes())
        digest.update(self.train_label.contiguous().numpy().tobytes())
        return digest.hexdigest()


def digits(held_out: int = 297, seed: int = 0) -> ImageData:
    """The 1797 handwritten digits of scikit-learn, 8 x 8, shuffled once and split.

    Args:
        held_out: images kept from training, between 1 and 1796.
        seed: of the split.

    Returns:
        1797 - held_out training images and held_out others, in [-1, 1].

    Raises:
        DataError: if held_out leaves one side empty.

    Source: UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), as shipped by scikit-learn.

    Example:
        >>> data = digits()
        >>> data.train.shape, data.held_out.shape
        (torch.Size([1500, 1, 8, 8]), torch.Size([297, 1, 8, 8]))
    """
    from sklearn.datasets import load_digits

    if not 1 <= held_out <= 1796:
        raise DataError(f"held_out must be between 1 and 1796 of the 1797 digits, got {held_out}")
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    label = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    rest, kept = order[held_out:], order[:held_out]
    return ImageData(
        name="digits",
        train=images[rest],
        train_label=label[rest],
        held_out=images[kept],
        held_out_label=label[kept],
        data_range=(-1.0, 1.0),
        classes=tuple(str(digit) for digit in range(10)),
        licence="CC BY 4.0, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
    )


def fashion_mnist(folder: str | Path = FASHION_FOLDER) -> ImageData:
    """Fashion-MNIST: 60000 training and 10000 held-out (test) images, 28 x 28, in [-1, 1].

    Args:
        folder: where the four gzipped idx files lie.

    Returns:
        The published split: `held_out` is the test set.

    Raises:
        DataError: if a file is missing or is not the idx file it should be.

    Source: Xiao, Rasul & Vollgraf (2017), arXiv 1708.07747.
    """
    folder = Path(folder)
    return ImageData(
        name="fashion-mnist",
        train=_idx(folder / "train-images-idx3-ubyte.gz", 3).float().div(127.5).sub(1).unsqueeze(1),
        train_label=_idx(folder / "train-labels-idx1-ubyte.gz", 1).long(),
        held_out=_idx(folder / "t10k-images-idx3-ubyte.gz", 3).float().div(127.5).sub(1).unsqueeze(1),
        held_out_label=_idx(folder / "t10k-labels-idx1-ubyte.gz", 1).long(),
        data_range=(-1.0, 1.0),
        classes=FASHION_CLASSES,
        licence="MIT, Copyright 2017 Zalando SE",
    )


def held_out_fashion(labels: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """A few Fashion-MNIST test images that come with the package, in the order t-shirt, trouser, ... , t-shirt, ...

    No training ever sees them. Licence: MIT, Copyright 2017 Zalando SE (text beside the file).

    Args:
        labels: keep only these classes; None keeps all.

    Returns:
        Images (n, 1, 28, 28) in [-1, 1], float32, and their labels (n,).

    Raises:
        WeightsError: if the file is damaged.
        DataError: if no image has one of the labels.

    Example:
        >>> images, label = held_out_fashion()
        >>> images.shape, label[:4].tolist()
        (torch.Size([32, 1, 28, 28]), [0, 1, 2, 3])
    """
    from models.zoo import read_checked

    folder = resources.files("models") / "weights"
    facts = json.loads((folder / "fashion28x28_held_out.json").read_text())
    tensors, _ = read_checked(folder / "fashion28x28_held_out.safetensors", facts["sha256"])
    images, label = tensors["images"].float().div(127.5).sub(1), tensors["labels"].long()
    if labels is not None:
        keep = torch.isin(label, torch.tensor(list(labels), dtype=torch.long))
        if not bool(keep.any()):
            raise DataError(f"labels must be some of 0 to 9 ({', '.join(FASHION_CLASSES)}), got {list(labels)}")
        images, label = images[keep], label[keep]
    return images, label


def _idx(path: Path, axes: int) -> Tensor:
    """Read a gzipped idx file of unsigned bytes with this many axes."""
    if not path.exists():
        raise DataError(
            f"{path} is missing; on Debian it comes with `apt install dataset-fashion-mnist`, elsewhere fetch the four "
            "idx.gz files from github.com/zalandoresearch/fashion-mnist and pass their folder"
        )
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    # Header: two zero bytes, type code 8 (unsigned byte), number of axes, then each length as a big-endian int32.
    head = 4 + 4 * axes
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    expected = head + torch.Size(shape).numel()
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) != expected:
        raise DataError(f"{path} is not an idx file of unsigned bytes with {axes} axes; fetch it again")
    return torch.frombuffer(bytearray(raw[head:]), dtype=torch.uint8).reshape(shape)
