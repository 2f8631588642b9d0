"""Few-shot classification: episodes of N classes with k images each to learn from, from any set of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.data import FASHION_FOLDER, digits, fashion_mnist
from models.meta.episodes import Episodes
from ppl.errors import DataError, OptionError, ShapeError
from ppl.option_checks import check_integers

__all__ = ["FewShot", "few_shot_digits", "few_shot_fashion", "few_shot_omniglot"]


@dataclass(frozen=True, eq=False)
class FewShot:
    """N-way k-shot episodes: N classes at random, in a random order that gives the labels 0..N-1, k images of each.

    Args:
        images: (images, *x) inputs.
        labels: (images,) integers, any; each value is a class.
        way: N, classes of an episode.
        shots: k, images of a class in the support set.
        queries: images of a class in the query set, others than those of the support set; 0 for no query set.
        classes: labels to draw from; None for all there are.

    Raises:
        OptionError: an option is out of range, or there are fewer classes than the way.
        ShapeError: images and labels do not fit together.
        DataError: labels are no integers, a class is not there, or has fewer images than shots and queries.

    Example:
        >>> tasks = few_shot_digits(way=3, shots=2, queries=4)
        >>> tasks(6, torch.Generator().manual_seed(0))
        Episodes(6 episodes, support 6, query 12, 3 classes)
    """

    images: Tensor
    labels: Tensor
    way: int = 5
    shots: int = 1
    queries: int = 15
    classes: Sequence[int] | None = None
    members: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_integers(self, way=2, shots=1, queries=0)
        if self.images.ndim < 2 or self.labels.shape != self.images.shape[:1]:
            raise ShapeError(
                f"expected images (n, ...) and labels (n,), got {tuple(self.images.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        if self.labels.is_floating_point():
            raise DataError(f"class labels are integers, got {self.labels.dtype}; use labels.long()")
        there = self.labels.unique().tolist()
        wanted = there if self.classes is None else list(self.classes)
        missing = [c for c in wanted if c not in set(there)]
        if missing or len(set(wanted)) != len(wanted):
            raise DataError(f"classes {missing or wanted} are not there, or named twice; labels are {there[:20]}")
        if len(wanted) < self.way:
            raise OptionError(f"{self.way}-way episodes need as many classes, and there are {len(wanted)}: {wanted}")
        members = [(self.labels == c).nonzero()[:, 0] for c in wanted]
        for c, own in zip(wanted, members, strict=True):
            if len(own) < self.shots + self.queries:
                raise DataError(
                    f"class {c} has {len(own)} images, fewer than {self.shots} shots and {self.queries} queries; "
                    "lower them, or leave the class out by classes="
                )
        object.__setattr__(self, "members", members)

    def __call__(self, episodes: int, generator: torch.Generator) -> Episodes:
        """See `EpisodeSource`."""
        each = self.shots + self.queries
        index = torch.empty(episodes, self.way, each, dtype=torch.long)
        for i in range(episodes):
            chosen = torch.randperm(len(self.members), generator=generator, device=generator.device)[: self.way]
            for j, c in enumerate(chosen.tolist()):
                own = self.members[c]
                order = torch.randperm(len(own), generator=generator, device=generator.device)[:each]
                index[i, j] = own[order.to(own.device)]
        label = torch.arange(self.way)[:, None].expand(self.way, each)

        def part(where: slice) -> tuple[Tensor, Tensor]:
            x = self.images[index[:, :, where].flatten(1)]
            return x.to(generator.device), label[:, where].flatten().expand(episodes, -1).to(generator.device)

        x, y = part(slice(self.shots))
        if not self.queries:
            return Episodes(x, y, way=self.way)
        return Episodes(x, y, *part(slice(self.shots, None)), way=self.way)


def few_shot_digits(
    way: int = 5, shots: int = 1, queries: int = 15, classes: Sequence[int] | None = None, held_out: bool = False
) -> FewShot:
    """Episodes of scikit-learn's digits, 8 x 8, as vectors of 64 pixels in [-1, 1].

    Args:
        way: classes of an episode.
        shots: images of a class in the support set.
        queries: images of a class in the query set.
        classes: digits to draw from; None for all ten.
        held_out: of the 297 images that no prior is trained on, in place of the other 1500.
    """
    data = digits()
    images, labels = (data.held_out, data.held_out_label) if held_out else (data.train, data.train_label)
    return FewShot(images.flatten(1), labels, way, shots, queries, classes)


def few_shot_fashion(
    way: int = 5,
    shots: int = 1,
    queries: int = 15,
    classes: Sequence[int] | None = None,
    held_out: bool = False,
    folder: str | Path = FASHION_FOLDER,
) -> FewShot:
    """Episodes of Fashion-MNIST, (1, 28, 28) in [-1, 1].

    Args:
        way: classes of an episode.
        shots: images of a class in the support set.
        queries: images of a class in the query set.
        classes: labels to draw from; None for all ten.
        held_out: of the 10,000 test images, in place of the 60,000 others.
        folder: where the gzipped idx files lie.

    Raises:
        DataError: a file is missing or damaged.
    """
    data = fashion_mnist(folder)
    images, labels = (data.held_out, data.held_out_label) if held_out else (data.train, data.train_label)
    return FewShot(images, labels, way, shots, queries, classes)


def few_shot_omniglot(
    path: str | Path,
    way: int = 5,
    shots: int = 1,
    queries: int = 15,
    alphabets: Sequence[str] | None = None,
    size: int = 28,
) -> FewShot:
    """Episodes of Omniglot characters from a packed file, (1, size, size) in [-1, 1], 1 for ink.

    Args:
        path: an .npz file with `ink_packed` (rows of numpy.packbits), `height`, `width`, `alphabet` and `character`.
        way: classes of an episode.
        shots: images of a class in the support set, of the 20 that there are.
        queries: images of a class in the query set.
        alphabets: to draw characters from, so that training and test can keep to different ones; None for all.
        size: of the images, which are averaged down.

    Raises:
        DataError: the file is missing, is no such file, or does not hold an alphabet.
        OptionError: size is not positive.

    Source: Lake, Salakhutdinov & Tenenbaum (2015), repository brendenlake/omniglot [inferred].
    """
    import numpy as np

    if not isinstance(size, int) or size < 1:
        raise OptionError(f"size is a number of pixels, at least 1, got {size!r}")
    if not Path(path).exists():
        raise DataError(f"{path} is missing; pass the path of a packed Omniglot file")
    try:
        with np.load(path) as file:
            packed, alphabet, character = (file[name] for name in ("ink_packed", "alphabet", "character"))
            height, width = int(file["height"]), int(file["width"])
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a packed Omniglot file ({error})") from error
    there = sorted(set(alphabet.tolist()))
    missing = [name for name in alphabets or () if name not in there]
    if missing:
        raise DataError(f"alphabets {missing} are not in {path}; it holds {there}")
    keep = np.isin(alphabet, there if alphabets is None else list(alphabets))
    ink = np.unpackbits(packed[keep], axis=1)[:, : height * width].reshape(-1, 1, height, width)
    images = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(ink).float(), size)
    names = [f"{a} {c}" for a, c in zip(alphabet[keep].tolist(), character[keep].tolist(), strict=True)]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([number[name] for name in names])
    return FewShot(2 * images - 1, labels, way, shots, queries)
