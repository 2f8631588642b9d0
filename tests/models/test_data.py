"""Data sets: shapes, ranges, fixed splits, and clear errors when a file is missing or damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

import models
from models.data import FASHION_CLASSES, FASHION_FOLDER, ImageData
from ppl.errors import DataError

needs_fashion = pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Fashion-MNIST is not on this machine")


def test_digits_are_split_once():
    data, again, other = models.digits(), models.digits(), models.digits(seed=1)
    assert data.event_shape == (1, 8, 8)
    assert (float(data.train.min()), float(data.train.max())) == (-1.0, 1.0)
    assert torch.equal(data.train, again.train)
    assert not torch.equal(data.train, other.train)
    assert data.fingerprint() == again.fingerprint() != other.fingerprint()
    # Every image is on exactly one side: the pixels of both sides add up to those of all 1797 images.
    whole, parts = models.digits(held_out=1), (data.train, data.held_out)
    assert sum(len(part) for part in parts) == 1797
    assert sum(part.double().sum() for part in parts) == whole.train.double().sum() + whole.held_out.double().sum()
    assert data.held_out_label.bincount(minlength=10).min() > 10
    with pytest.raises(DataError, match="between 1 and 1796"):
        models.digits(held_out=1797)


@needs_fashion
def test_fashion_mnist_is_the_published_split():
    data = models.fashion_mnist()
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.held_out.shape == (10000, 1, 28, 28)
    assert (float(data.train.min()), float(data.train.max())) == (-1.0, 1.0)
    assert data.train_label.bincount().tolist() == [6000] * 10
    assert data.train_label[0] == FASHION_CLASSES.index("ankle boot")
    images, label = models.held_out_fashion()
    index = [int(torch.nonzero((data.held_out == x).flatten(1).all(1))[0, 0]) for x in images]
    assert len(set(index)) == 32
    assert torch.equal(data.held_out_label[index], label)


def test_held_out_fashion_needs_no_other_file():
    images, label = models.held_out_fashion()
    assert images.shape == (32, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert label.bincount(minlength=10).tolist() == [4, 4, 3, 3, 3, 3, 3, 3, 3, 3]
    shoes, kind = models.held_out_fashion(labels=[5, 7])
    assert len(shoes) == 6
    assert set(kind.tolist()) == {5, 7}
    with pytest.raises(DataError, match="sneaker"):
        models.held_out_fashion(labels=[10])
    weights = Path(models.__file__).parent / "weights"
    assert "Zalando" in (weights / "fashion28x28_held_out.LICENSE").read_text()
    assert "MIT" in json.loads((weights / "fashion28x28_held_out.json").read_text())["licence"]


def test_missing_fashion_names_the_package(tmp_path):
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        models.fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"not gzip", gzip.compress(b"\0\0\x0d\3" + bytes(12)), gzip.compress(b"\0\0\x08\3" + bytes([0, 0, 0, 2] * 3))],
    ids=["not gzip", "floats", "short"],
)
def test_damaged_idx_files_are_refused(tmp_path, raw):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(DataError, match="fetch it again"):
        models.fashion_mnist(tmp_path)


def test_image_data_checks_shapes_and_range():
    x, label = torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(DataError, match="rescale"):
        ImageData("x", x + 2, label, x, label, (-1.0, 1.0), ("a",), "none")
    with pytest.raises(DataError, match="labels"):
        ImageData("x", x, label[:2], x, label, (-1.0, 1.0), ("a",), "none")


def test_scales_of_the_data():
    """rms and principal sd of two opposite images are known exactly: 2 images +a, -a have sd |a| sqrt(2)."""
    a = torch.full((1, 1, 2, 2), 0.5)
    x, label = torch.cat([a, -a]), torch.zeros(2, dtype=torch.long)
    data = ImageData("x", x, label, x, label, (-1.0, 1.0), ("a",), "none")
    assert data.rms() == pytest.approx(0.5)
    assert data.principal_sd() == pytest.approx(2**0.5)
