"""A saved posterior comes back bit by bit, is readable by ArviZ, and damage is noticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppl.cost import Cost
from ppl.errors import CheckpointError, OptionError
from ppl.posterior import Estimate, Posterior, SavedGuide

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64).to(dtype)


def same(one: Tensor | None, two: Tensor | None) -> bool:
    """Equal bits, dtype and shape."""
    if one is None or two is None:
        return one is two
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*flat)


def assert_same(one: Posterior, two: Posterior) -> None:
    for name in ("draws", "parameters", "info", "observed"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.keys() == right.keys(), name
        for key in left:
            assert same(left[key], right[key]), (name, key)
    assert same(one.log_weight, two.log_weight)
    assert (one.log_evidence is None) == (two.log_evidence is None)
    if one.log_evidence is not None and two.log_evidence is not None:
        assert all(same(a, b) for a, b in zip(one.log_evidence, two.log_evidence, strict=True))
    assert one.cost == two.cost
    for name in ("dims", "coords", "attrs"):
        assert getattr(one, name) == getattr(two, name), name


def round_trip(posterior: Posterior, folder: Path) -> Posterior:
    posterior.save(folder / "posterior.nc")
    return Posterior.load(folder / "posterior.nc")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    posterior = Posterior(
        draws={
            "scalar": random((2, 3), dtype),
            "empty": random((2, 3, 0, 4), dtype),
            "image": random((2, 3, 1, 4), dtype),
        },
        parameters={"scalar": random((), dtype), "empty": random((0,), dtype), "matrix": random((3, 2), dtype).T},
        info={
            "per_draw": random((2, 3), dtype),
            "per_draw_vector": random((2, 3, 2), dtype),
            "other": random((7,), dtype),
        },
        observed={"y": random((5,), dtype), "none": random((0, 2), dtype), "number": random((), dtype)},
    )
    assert_same(posterior, round_trip(posterior, tmp_path))


@pytest.mark.parametrize("shape", [(1, 0), (0, 0), (3, 1)])
def test_no_draws(shape: tuple[int, int], tmp_path: Path) -> None:
    posterior = Posterior({"x": torch.zeros(*shape, 2), "s": torch.zeros(shape)}, log_weight=torch.zeros(shape))
    assert_same(posterior, round_trip(posterior, tmp_path))


def test_values_that_a_format_may_bend(tmp_path: Path) -> None:
    """NaN with its payload, infinities, minus zero, subnormals, the largest integers, netCDF's own fill value."""
    bits = torch.tensor([0x7FF8000000000123, 0x7FF0000000000000, -1, 1], dtype=torch.int64).view(torch.float64)
    odd = torch.cat([bits, torch.tensor([-0.0, float("-inf"), 9.969209968386869e36, 1e-310], dtype=torch.float64)])
    extremes = torch.tensor([2**63 - 1, -(2**63), 2**53 + 1, -127], dtype=torch.int64)
    posterior = Posterior({"x": odd.reshape(2, 4), "n": extremes.reshape(2, 2).repeat(1, 2)}, parameters={"p": odd})
    assert_same(posterior, round_trip(posterior, tmp_path))


@pytest.mark.parametrize("problems", [None, 3])
def test_everything_else(problems: int | None, tmp_path: Path) -> None:
    lead = () if problems is None else (problems,)
    posterior = Posterior(
        draws={
            "net.layer$$$weight/0": random((*lead, 2, 5, 4, 3), torch.float32),
            "school": random((*lead, 2, 5, 8), torch.float64),
            "chain": random((*lead, 2, 5), torch.float64),
            "time": random((*lead, 2, 5), torch.int64),
        },
        log_weight=random((*lead, 2, 5), torch.float32),
        log_evidence=Estimate(random(lead, torch.float64), random(lead, torch.float64, 1).abs()),
        parameters={"AutoNormal.locs.x$$$a/b": random((2,), torch.float64), "": random((), torch.float64)},
        guide=SavedGuide({"class": "LowRank", "rank": 2, "shape": (2, 3)}, {"loc.x": random((3,), torch.float32)}),
        cost=Cost(denoiser_calls=3, seconds=1.5, peak_memory=2**40),
        info={
            "log_weight": random((*lead, 2, 5), torch.float64, 5),
            "diverging": random((*lead, 2, 5), torch.bool),
            "elbo": random((3000,), torch.float64),
            "root_ess": torch.tensor(3.0),
            "log_likelihood.y": random((*lead, 2, 5, 6), torch.float64),
        },
        dims={"school": ("school",), "net.layer$$$weight/0": ("units", "units"), "y": ("obs",)},
        coords={"school": [f"Schule {i} ü" for i in range(8)], "obs": torch.arange(6) / 3},
        observed={"y": random((6,), torch.float64)},
        attrs={
            "backend": "SMC",
            "complete": False,
            "notes": ["a", "b" * 100_000],
            "nothing": None,
            "shape": (2, (3,)),
            "table": {1: 2.5, "x": [True, float("inf")]},
            "matrix": torch.eye(2, dtype=torch.complex128),
            **({} if problems is None else {"problems": problems}),
        },
    )
    loaded = round_trip(posterior, tmp_path)
    matrix = posterior.attrs.pop("matrix"), loaded.attrs.pop("matrix")
    assert same(*matrix)
    assert_same(posterior, loaded)
    assert isinstance(loaded.guide, SavedGuide)
    assert loaded.guide.meta == {"class": "LowRank", "rank": 2, "shape": (2, 3)}
    assert same(loaded.guide.tensors["loc.x"], posterior.guide.tensors["loc.x"])
    again = round_trip(loaded, tmp_path)  # over the existing file
    assert_same(loaded, again)


def test_a_guide_without_state_is_noted(tmp_path: Path) -> None:
    loaded = round_trip(Posterior({"x": torch.zeros(1, 2)}, guide=object()), tmp_path)
    assert loaded.guide is None
    assert "was not saved" in loaded.attrs["notes"][0]


def test_plain_arviz_reads_it(tmp_path: Path) -> None:
    import arviz

    x = random((2, 50, 3), torch.float64)
    posterior = Posterior(
        {"x": x, "flag": random((2, 50), torch.bool)},
        parameters={"p": torch.ones(2)},
        info={"diverging": random((2, 50), torch.bool)},
        dims={"x": ("city",)},
        coords={"city": ["a", "b", "c"]},
        observed={"y": torch.ones(4)},
    )
    posterior.save(tmp_path / "plain.nc")
    data = arviz.from_netcdf(tmp_path / "plain.nc")
    assert data.posterior["x"].dims == ("chain", "draw", "city")
    assert data.posterior["city"].values.tolist() == ["a", "b", "c"]
    assert data.posterior["x"].values.tolist() == x.tolist()
    assert data.sample_stats["diverging"].dtype == bool
    assert data.observed_data["y"].shape == (4,)
    assert arviz.rhat(data, var_names="x")["x"].shape == (3,)
    data.close()
    weighted = dataclasses.replace(posterior, log_weight=torch.zeros(2, 50))
    weighted.save(tmp_path / "weighted.nc")
    data = arviz.from_netcdf(tmp_path / "weighted.nc")
    assert "posterior" not in data.groups(), "weighted draws must not pass for equally weighted ones"
    assert data.weighted_posterior["x"].shape == (2, 50, 3)
    data.close()


def test_damage_is_noticed(tmp_path: Path) -> None:
    """A flipped bit in the draws, a cut file, a foreign file and a file that is none."""
    path = tmp_path / "p.nc"
    marker = torch.full((1, 64), 1.2345678901234567, dtype=torch.float64)
    Posterior({"x": marker}).save(path)
    whole = path.read_bytes()
    where = whole.index(marker[0, :2].numpy().tobytes())
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        Posterior.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Posterior.load(path)
    path.write_text("not netCDF")
    with pytest.raises(CheckpointError, match="not a netCDF"):
        Posterior.load(path)
    import xarray

    xarray.Dataset({"a": ("n", [1.0])}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(CheckpointError, match="not written by"):
        Posterior.load(path)
    with pytest.raises(FileNotFoundError):
        Posterior.load(tmp_path / "absent.nc")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.nc"
    good = Posterior({"x": torch.ones(1, 2)})
    good.save(path)
    with pytest.raises(OptionError, match=r"attrs.*object"):
        dataclasses.replace(good, attrs={"thing": object()}).save(path)
    assert_same(good, Posterior.load(path))
    assert [file.name for file in tmp_path.iterdir()] == ["p.nc"]


def test_missing_folders_are_made_and_a_folder_is_no_file(tmp_path: Path) -> None:
    """A path that does not exist yet must not cost the draws."""
    posterior = Posterior({"x": torch.zeros(1, 2)})
    posterior.save(tmp_path / "not" / "there" / "yet.nc")
    assert "x" in Posterior.load(tmp_path / "not" / "there" / "yet.nc")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"):
        posterior.save(tmp_path / "not")
