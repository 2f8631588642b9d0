"""The result: its checks, weighted statistics against closed form, tables, ArviZ in both formats."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl import weighted
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError, ShapeError
from ppl.posterior import Estimate, Posterior

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def repeated(x: Tensor, counts: Tensor) -> tuple[Posterior, Posterior]:
    """Draws with integer weights, and the same draws repeated as often: the same distribution."""
    by_weight = Posterior({"x": x}, log_weight=counts.double().log() + 123.0)
    by_count = x.flatten(0, 1).repeat_interleave(counts.flatten(), 0)[None]
    return by_weight, Posterior({"x": by_count})


# -- checks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": {"x": torch.zeros(5)}}, r"'x' have shape \(5,\).*values\[None\]"),
        ({"draws": {"x": torch.zeros(2, 5), "s": torch.zeros(5, 2)}}, "'s'"),
        ({"draws": {"x": torch.zeros(2, 5)}, "log_weight": torch.zeros(5)}, "log_weight"),
        ({"draws": {"x": torch.zeros(2, 5, 3)}, "dims": {"x": ["a", "b"]}}, "1 axes behind.*2 dims"),
        (
            {"draws": {"x": torch.zeros(2, 5, 3)}, "dims": {"x": ["a"]}, "coords": {"a": [1, 2]}},
            "3 entries but 2 labels",
        ),
        ({"draws": {"x": torch.zeros(2, 5)}, "attrs": {"problems": 2}}, "'x'"),
        ({"draws": {"x": torch.zeros(3, 2, 5)}, "attrs": {"problems": 2}}, "leading axis of the draws is 3"),
        ({"draws": {"x": torch.zeros(2, 2, 5)}, "attrs": {"problems": "two"}}, "positive integer"),
        ({"draws": {"x": torch.zeros(2, 5)}, "log_evidence": Estimate(torch.zeros(2), torch.zeros(2))}, "log_evidence"),
        ({"draws": {"x": [[0.0]]}}, "tensor, got list"),
    ],
)
def test_wrong_shapes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Posterior(**arguments)


def test_shape_and_flatten() -> None:
    x = normal(2, 5, 3)
    posterior = Posterior({"x": x}, log_evidence=(1.5, 0.1))  # type: ignore[arg-type]
    assert (len(posterior), posterior.chains, posterior.problems, "x" in posterior) == (10, 2, None, True)
    assert torch.equal(posterior.flatten("x"), torch.cat([x[0], x[1]]))
    assert posterior.log_evidence == Estimate(torch.tensor(1.5, dtype=F64), torch.tensor(0.1, dtype=F64))
    with pytest.raises(OptionError, match=r"'z'.*'x'"):
        posterior.flatten("z")
    many = Posterior({"x": normal(4, 2, 5, 3)}, attrs={"problems": 4})
    assert many.flatten("x").shape == (4, 10, 3)
    assert (many.mean("x").shape, many.sd("x").shape, many.quantile("x", [0.1, 0.5]).shape) == (
        (4, 3),
        (4, 3),
        (2, 4, 3),
    )
    assert bool(Posterior({"x": torch.zeros(1, 0)}))


# -- weighted statistics


def test_equal_weights_agree_with_numpy() -> None:
    x = normal(3, 7, 2)
    q = [0.0, 0.05, 0.31, 0.5, 0.95, 1.0]
    flat = x.flatten(0, 1).numpy()
    posterior = Posterior({"x": x})
    torch.testing.assert_close(posterior.mean("x"), torch.from_numpy(flat.mean(0)))
    torch.testing.assert_close(posterior.sd("x"), torch.from_numpy(flat.std(0, ddof=1)))
    torch.testing.assert_close(posterior.quantile("x", q), torch.from_numpy(np.quantile(flat, q, axis=0)))
    assert posterior.quantile("x", 0.5).shape == (2,)
    weighted_equally = Posterior({"x": x}, log_weight=torch.full((3, 7), -800.0))
    torch.testing.assert_close(weighted_equally.mean("x"), posterior.mean("x"))
    torch.testing.assert_close(weighted_equally.sd("x"), posterior.sd("x"))
    assert weighted_equally.ess("x")[0].item() == pytest.approx(21)


def test_integer_weights_are_repetitions() -> None:
    x = normal(2, 6, 3)
    counts = torch.tensor([[1, 0, 3, 2, 0, 5], [2, 2, 0, 1, 7, 1]])
    by_weight, by_count = repeated(x, counts)
    torch.testing.assert_close(by_weight.mean("x"), by_count.mean("x"))
    n, w = counts.sum(), counts / counts.sum()
    # The repeated draws give the biased variance exactly; the correction is that of reliability weights.
    biased = by_count.sd("x").square() * (n - 1) / n
    torch.testing.assert_close(by_weight.sd("x"), (biased / (1 - w.square().sum())).sqrt())
    torch.testing.assert_close(by_weight.ess("x"), torch.full((3,), 1 / w.square().sum().item(), dtype=F64))
    ordered = by_count.flatten("x").sort(0).values
    for level in (0.0, 0.013, 0.2, 0.5, 0.77, 1.0):
        rank = max(math.ceil(level * int(n) - 1e-9), 1)
        torch.testing.assert_close(by_weight.quantile("x", level), ordered[rank - 1])
    assert by_weight.weights is not None
    assert by_weight.weights.shape == (2, 6)
    assert by_weight.weights.sum().item() == pytest.approx(1)


def test_importance_weights_find_the_target() -> None:
    """Draws of N(0, 1) weighted to N(1, 0.5^2): mean, sd, median; false alarm about 3e-6 (|z| < 4.9, three tests).

    The squared ratio of densities is N(8/7, 1/7), so the delta method gives the standard errors in closed form:
    with d = x - 1, E d^2 = 8/49 and E (d^2 - 1/4)^2 = 0.06001. Dropping the weights would shift the mean by 1.
    """
    x = normal(4, 100_000)
    log_weight = -0.5 * ((x - 1) / 0.5).square() + 0.5 * x.square()
    posterior = Posterior({"x": x}, log_weight=log_weight)
    ess = posterior.ess("x").item()
    kish = 0.25 * math.sqrt(7) * math.exp(-0.5 * (64 / 7 - 8))
    assert ess / 400_000 == pytest.approx(kish, rel=0.05)
    exact = 400_000 * kish
    assert abs(posterior.mean("x").item() - 1) < 4.9 * math.sqrt(8 / 49 / exact)
    assert abs(posterior.sd("x").item() - 0.5) < 4.9 * math.sqrt(0.06001 / exact)
    assert abs(posterior.quantile("x", 0.5).item() - 1) < 4.9 * 0.5 * 0.5 * math.sqrt(2 * math.pi / exact)


def test_zero_weights_never_enter() -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0, float("inf")]])
    posterior = Posterior({"x": x}, log_weight=torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]))
    assert posterior.mean("x").item() == 2
    assert posterior.sd("x").item() == pytest.approx(math.sqrt(2))
    assert posterior.quantile("x", [0.0, 0.4, 0.6, 1.0]).tolist() == [1, 1, 3, 3]
    assert set(posterior.sample("x", 50, seeded()).tolist()) == {1, 3}


def test_infinite_and_nan_draws_are_not_hidden() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, float("inf"), float("inf")]])
    assert Posterior({"x": x}).quantile("x", [0.25, 1.0]).tolist() == [1.0, float("inf")]
    assert Posterior({"x": torch.tensor([[0.0, float("nan")]])}).quantile("x", 0.0).isnan()
    one = Posterior({"x": torch.ones(1, 3)}, log_weight=torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    assert one.sd("x").isnan(), "one draw says nothing about spread"
    assert Posterior({"x": torch.ones(1, 1)}).sd("x").isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights(bad: float) -> None:
    with pytest.raises(NotFiniteError, match="log weights"):
        Posterior({"x": torch.ones(1, 2)}, log_weight=torch.tensor([[0.0, bad]])).mean("x")
    with pytest.raises(NotFiniteError, match="probability zero"):
        Posterior({"x": torch.ones(1, 2)}, log_weight=torch.full((1, 2), -torch.inf)).mean("x")


def test_dtypes_of_statistics() -> None:
    flags = torch.tensor([[True, False, True, True]])
    phase = torch.tensor([[3 + 4j, 3 + 4j, -1j, 1j]], dtype=torch.complex64)
    posterior = Posterior({"b": flags, "c": phase, "f": torch.tensor([[0.5, 1, 2, 3]]), "n": torch.arange(4)[None]})
    assert posterior.mean("b").item() == 0.75
    assert [posterior.mean(site).dtype for site in "bcfn"] == [F64, torch.complex64, torch.float32, F64]
    assert [posterior.sd(site).dtype for site in "bcfn"] == [F64, torch.float32, torch.float32, F64]
    assert posterior.mean("c").item() == 1.5 + 2j
    torch.testing.assert_close(
        posterior.sd("c").item(), math.sqrt((6.25 * 2 + 2.25 + 9 + 2.25 + 1) / 3), rtol=1e-6, atol=0
    )
    with pytest.raises(OptionError, match="complex"):
        posterior.quantile("c", 0.5)
    with pytest.raises(OptionError, match=r"1\.5"):
        posterior.quantile("f", 1.5)


def test_problems_are_weighted_by_themselves() -> None:
    x = normal(2, 3, 5)
    log_weight = normal(2, 3, 5, seed=1)
    both = Posterior({"x": x}, log_weight=log_weight + torch.tensor([0.0, 700.0])[:, None, None], attrs={"problems": 2})
    for problem in range(2):
        one = Posterior({"x": x[problem]}, log_weight=log_weight[problem])
        torch.testing.assert_close(both.mean("x")[problem], one.mean("x"))
        torch.testing.assert_close(both.sd("x")[problem], one.sd("x"))
        torch.testing.assert_close(both.quantile("x", 0.3)[problem], one.quantile("x", 0.3))
        torch.testing.assert_close(both.ess("x")[problem], one.ess("x"))


# -- resampling


def test_systematic_counts() -> None:
    """Draw i comes floor or ceil of n W_i times, and n W_i times on average over the offset.

    Average over 4000 offsets, error of each count below 0.5 / sqrt(4000): 5 standard errors over 6 counts, about 4e-6.
    """
    w = torch.tensor([[0.0, 0.3, 0.05, 0.25, 0.4, 0.0]], dtype=F64)
    generator, total = seeded(), torch.zeros(6, dtype=F64)
    for _ in range(4000):
        index = weighted.systematic(w, 6, 7, 1, generator)
        counts = torch.bincount(index[0], minlength=6)
        assert ((counts >= (7 * w[0] - 1e-9).floor()) & (counts <= (7 * w[0] + 1e-9).ceil())).all()
        total += counts
    assert ((total / 4000 - 7 * w[0]).abs() < 5 * 0.5 / math.sqrt(4000)).all()


def test_sample() -> None:
    x = torch.arange(20.0).reshape(2, 10)
    posterior = Posterior({"x": x, "twice": 2 * x})
    drawn = posterior.sample("x", 20, seeded())
    assert sorted(drawn.tolist()) == list(range(20)), "with equal weights none comes twice"
    assert drawn.tolist() != sorted(drawn.tolist())
    assert torch.equal(posterior.sample("twice", 7, seeded(3)), 2 * posterior.sample("x", 7, seeded(3)))
    assert posterior.sample("x", 0, seeded()).shape == (0,)
    many = Posterior({"x": normal(3, 2, 5, 4)}, attrs={"problems": 3})
    assert many.sample("x", 6, seeded()).shape == (3, 6, 4)
    with pytest.raises(OptionError, match="from none"):
        Posterior({"x": torch.zeros(1, 0)}).sample("x", 1, seeded())


def test_resampled_keeps_rows_together() -> None:
    x = normal(2, 50)
    posterior = Posterior(
        {"x": x, "y": x[..., None] * torch.arange(3)},
        log_weight=normal(2, 50, seed=1),
        info={"lp": -x, "elbo": torch.zeros(7)},
    )
    again = posterior.resampled(seeded())
    assert again.log_weight is None
    assert again.attrs["resampled"] is True
    assert again.draws["y"].shape == (1, 100, 3)
    assert torch.equal(again.draws["y"][..., 2], 2 * again.draws["x"])
    assert torch.equal(again.info["lp"], -again.draws["x"])
    assert again.info["elbo"].shape == (7,)
    assert again.ess("x").item() == pytest.approx(posterior.ess("x").item()), "resampling makes no new information"
    assert (again.mean("x") - posterior.mean("x")).abs().item() < 0.1


# -- effective sample size


def test_root_ess_is_preferred() -> None:
    x, log_weight = normal(2, 4), torch.tensor([[0.0] * 4, [math.log(3.0)] * 4])
    assert Posterior({"x": x}, log_weight, info={"root_ess": torch.tensor(2.5)}).ess("x").item() == 2.5
    # Shares 1/4 and 3/4 of the weight: 1 / (1/16/2 + 9/16/3).
    per_chain = Posterior({"x": x}, log_weight, info={"root_ess": torch.tensor([2.0, 3.0])})
    assert per_chain.ess("x").item() == pytest.approx(1 / (1 / 32 + 9 / 48))
    table = per_chain.summary()
    assert table.loc["x", "ess_bulk"] == pytest.approx(per_chain.ess("x").item())
    assert table.loc["x", "mcse"] == pytest.approx(table.loc["x", "sd"] / math.sqrt(per_chain.ess("x").item()))
    with pytest.raises(ShapeError, match="root_ess"):
        Posterior({"x": x}, info={"root_ess": torch.ones(3)}).ess("x")
    many = Posterior({"x": normal(3, 2, 4)}, info={"root_ess": torch.tensor([1.0, 2.0, 3.0])}, attrs={"problems": 3})
    assert many.ess("x").tolist() == [1, 2, 3]


def test_chains_have_the_ess_of_arviz() -> None:
    import arviz

    x = normal(4, 200, 3).cumsum(1) * 0.1 + normal(4, 200, 3, seed=1)
    posterior = Posterior({"x": x})
    data = arviz.convert_to_dataset({"x": x.numpy()})
    torch.testing.assert_close(posterior.ess("x"), torch.from_numpy(arviz.ess(data)["x"].values))
    table = posterior.summary()
    expected = arviz.summary(data, round_to="none")
    for ours, theirs in [("mean", "mean"), ("sd", "sd"), ("mcse", "mcse_mean"), ("r_hat", "r_hat")]:
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-10)
    np.testing.assert_allclose(table["ess_bulk"], expected["ess_bulk"])
    np.testing.assert_allclose(table["ess_tail"], expected["ess_tail"])


# -- the table


def test_summary_rows() -> None:
    posterior = Posterior(
        {
            "s": normal(2, 8),
            "x": normal(2, 8, 2, 2),
            "c": torch.complex(normal(2, 8), normal(2, 8, seed=1)),
            "b": normal(2, 8) > 0,
        },
        dims={"x": ("city", "k")},
        coords={"city": ["Bonn", "Köln"]},
        attrs={"complete": False},
    )
    table = posterior.summary()
    rows = ["s", "x[Bonn, 0]", "x[Bonn, 1]", "x[Köln, 0]", "x[Köln, 1]", "c.real", "c.imag", "b"]
    assert list(table.index) == rows
    assert list(table.columns) == ["mean", "sd", "5%", "50%", "95%", "mcse", "ess_bulk", "ess_tail", "r_hat"]
    assert table.attrs["complete"] is False
    assert table.loc["x[Köln, 0]", "mean"] == pytest.approx(posterior.mean("x")[1, 0].item())
    assert table.loc["x[Köln, 0]", "95%"] == pytest.approx(posterior.quantile("x", 0.95)[1, 0].item())
    assert table.loc["c.imag", "mean"] == pytest.approx(posterior.mean("c").imag.item())
    assert list(posterior.summary(["s"]).index) == ["s"]
    short = posterior.summary(["x"], limit=2)
    assert list(short.index) == ["x[Bonn, 0]", "x[Köln, 1]"]
    assert short.attrs["left_out"] == {"x": "2 of 4 numbers are shown"}


def test_summary_of_problems_and_of_little() -> None:
    x = normal(2, 3, 40, 2)
    table = Posterior({"x": x}, attrs={"problems": 2}).summary()
    assert list(table.index) == [(0, "x[0]"), (0, "x[1]"), (1, "x[0]"), (1, "x[1]")]
    alone = Posterior({"x": x[1]}).summary()
    np.testing.assert_allclose(table.loc[1].to_numpy(), alone.to_numpy())
    for shape in [(1, 0), (1, 1), (1, 3), (0, 0)]:
        few = Posterior({"x": torch.zeros(shape)}).summary()
        assert few["ess_bulk"].isna().all()
    none = Posterior({"x": torch.zeros(1, 0, 2)}, log_weight=torch.zeros(1, 0))
    assert none.ess("x").tolist() == [0, 0]
    assert none.mean("x").isnan().all()
    assert none.sd("x").isnan().all()
    assert none.quantile("x", [0.1, 0.5]).isnan().all()
    constant = Posterior({"x": torch.ones(2, 50)}).summary()
    assert constant.loc["x", "sd"] == 0


def test_repr() -> None:
    posterior = Posterior(
        {"x": torch.zeros(2, 5, 3)},
        log_weight=torch.zeros(2, 5),
        log_evidence=Estimate(torch.tensor(-12.345), torch.tensor(0.12)),
        cost=Cost(denoiser_calls=1200, seconds=3.14),
        attrs={"backend": "SMC<k>", "complete": False},
    )
    text = repr(posterior)
    for part in [
        "SMC<k>: 2 chains x 5 draws, weighted",
        "INCOMPLETE",
        "x (3,)",
        "-12.35 +- 0.12",
        "1,200 denoiser calls",
    ]:
        assert part in text or part.replace("-12.35", "-12.34") in text, part
    assert "INCOMPLETE" not in repr(Posterior({"x": torch.zeros(1, 1)}))
    assert "SMC&lt;k&gt;" in posterior._repr_html_()


# -- joining runs


def test_concat_by_evidence() -> None:
    """Evidences 1 and 3 with equal numbers of draws: shares 1/4 and 3/4, whatever each run's own constant."""
    runs = [
        Posterior(
            {"x": torch.full((1, 4), value)},
            log_weight=torch.full((1, 4), constant),
            log_evidence=Estimate(torch.tensor(z).log(), torch.tensor(0.2)),
            info={"lp": torch.full((1, 4), value), "elbo": torch.tensor(value), "root_ess": torch.tensor(2.0)},
            cost=Cost(vjps=2),
            attrs={"backend": "SMC", "notes": ["n"], "seed": int(value)},
        )
        for value, constant, z in [(0.0, 5.0, 1.0), (1.0, -300.0, 3.0)]
    ]
    joined = Posterior.concat(runs)
    assert joined.mean("x").item() == pytest.approx(0.75)
    assert joined.log_evidence is not None
    assert joined.log_evidence.value.item() == pytest.approx(math.log(2))
    assert joined.log_evidence.stderr.item() == pytest.approx(0.2 * math.hypot(0.25, 0.75))
    assert joined.info["lp"].tolist() == [[0.0] * 4, [1.0] * 4]
    assert joined.info["elbo_per_run"].tolist() == [0, 1]
    assert joined.ess("x").item() == pytest.approx(2 / (1 / 16 + 9 / 16))
    assert joined.cost.vjps == 4
    assert joined.attrs == {"backend": "SMC", "notes": ["n"], "seed": [0, 1]}
    assert len(Posterior.concat([joined, joined])) == 16


def test_concat_of_chains() -> None:
    runs = [Posterior({"x": normal(c, 5, 2, seed=c)}, parameters={"p": torch.tensor(1.0 * c)}) for c in (1, 2)]
    joined = Posterior.concat(runs)
    assert torch.equal(joined["x"], torch.cat([run["x"] for run in runs]))
    assert joined.log_weight is None
    assert joined.parameters == {}
    assert "different parameters" in joined.attrs["notes"][0]
    many = Posterior.concat([Posterior({"x": normal(3, 1, 5)}, attrs={"problems": 3})] * 2)
    assert many.shape == (3, 2, 5)


@pytest.mark.parametrize(
    "other",
    [
        Posterior({"z": torch.zeros(1, 4)}),
        Posterior({"x": torch.zeros(1, 5)}),
        Posterior({"x": torch.zeros(1, 4)}, log_weight=torch.zeros(1, 4)),
        Posterior({"x": torch.zeros(1, 4)}, observed={"y": torch.ones(1)}),
    ],
    ids=["site", "draws", "weights", "data"],
)
def test_concat_refuses(other: Posterior) -> None:
    with pytest.raises(ShapeError, match=r"0 and 1"):
        Posterior.concat([Posterior({"x": torch.zeros(1, 4)}), other])
    with pytest.raises(OptionError, match="at least one"):
        Posterior.concat([])


# -- ArviZ


def to(posterior: Posterior, format: str, **options: Any) -> Any:
    return posterior.to_arviz(format=format, **options)  # type: ignore[arg-type]


def group(data: Any, name: str) -> Any:
    """A group of either format as a dataset."""
    found = data[name]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


FORMATS = ["inferencedata", "datatree"]


@pytest.mark.parametrize("format", FORMATS)
def test_arviz_groups_dims_coords(format: str) -> None:
    x = normal(2, 10, 3)
    posterior = Posterior(
        {"x": x, "s": normal(2, 10), "flag": x[..., 0] > 0, "c": torch.complex(x, -x)},
        info={
            "diverging": x[..., 0] > 1,
            "lp": x[..., 1],
            "elbo": torch.zeros(4),
            "log_likelihood.y": normal(2, 10, 4),
        },
        dims={"x": ("city",), "y": ("obs",)},
        coords={"city": ["a", "b", "c"], "obs": [10, 20, 30, 40]},
        observed={"y": normal(4)},
        parameters={"p": torch.zeros(2), "large": torch.zeros(5000)},
        cost=Cost(denoiser_calls=7),
        log_evidence=Estimate(torch.tensor(1.0), torch.tensor(0.5)),
        attrs={"complete": False, "nothing": None},
    )
    data = to(posterior, format)
    draws = group(data, "posterior")
    assert draws["x"].dims == ("chain", "draw", "city")
    assert draws["city"].values.tolist() == ["a", "b", "c"]
    assert draws["chain"].values.tolist() == [0, 1]
    assert draws["c"].dims == ("chain", "draw", "c_dim_0")
    np.testing.assert_array_equal(draws["x"].values, x.numpy())
    assert draws["flag"].dtype == bool
    assert group(data, "sample_stats")["diverging"].dtype == bool
    assert set(group(data, "sample_stats").data_vars) == {"diverging", "lp"}
    assert group(data, "log_likelihood")["y"].dims == ("chain", "draw", "obs")
    assert group(data, "observed_data")["y"]["obs"].values.tolist() == [10, 20, 30, 40]
    facts = json.loads(data.attrs["pilotlight"])
    assert facts["cost"]["denoiser_calls"] == 7
    assert facts["log_evidence"] == [1.0, 0.5]
    assert facts["info"]["elbo"] == [0] * 4
    assert facts["parameters"] == {"p": [0, 0]}
    assert facts["left_out"]["large"]["shape"] == [5000]
    assert facts["complete"] is False


def test_arviz_uses_it() -> None:
    """loo, summary and R-hat of the installed ArviZ run on the export, and netCDF accepts its attributes."""
    import arviz

    posterior = Posterior(
        {"x": normal(2, 200)},
        info={"log_likelihood.y": normal(2, 200, 30) * 0.1 - 1},
        observed={"y": normal(30)},
        attrs={"complete": True, "table": {1: None}},
    )
    data = posterior.to_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert arviz.loo(data).elpd_loo == pytest.approx(-30, rel=0.1)
    assert arviz.summary(data).loc["x", "r_hat"] < 1.1


@pytest.mark.parametrize("format", FORMATS)
def test_arviz_files(format: str, tmp_path: Any) -> None:
    import xarray

    data = to(Posterior({"x": normal(2, 20, 3)}, parameters={"p": torch.zeros(1400)}), format)
    data.to_netcdf(str(tmp_path / "a.nc"), engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "a.nc", group="posterior", engine="h5netcdf") as draws:
        assert draws["x"].shape == (2, 20, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_arviz_of_weighted_draws(format: str) -> None:
    """Resampled and marked so; every value drawn floor or ceil of n W times; as they are on request."""
    x = torch.arange(8.0, dtype=F64).reshape(2, 4)
    counts = torch.tensor([[1.0, 0, 2, 0], [0, 4, 0, 1]])
    posterior = Posterior({"x": x}, log_weight=counts.log(), info={"lp": -x})
    data = to(posterior, format)
    draws = group(data, "posterior")
    assert draws["x"].shape == (1, 8)
    assert draws["x"].values.tolist() == [[0, 2, 2, 5, 5, 5, 5, 7]]
    assert draws.attrs["resampled"] == 1
    assert draws.attrs["effective_draws"] == pytest.approx(64 / 22)
    assert group(data, "sample_stats")["lp"].values.tolist() == [[0, -2, -2, -5, -5, -5, -5, -7]]
    assert "log_weight" not in group(data, "sample_stats")
    raw = to(posterior, format, resample=False)
    assert group(raw, "posterior").attrs["resampled"] == 0
    np.testing.assert_array_equal(group(raw, "posterior")["x"].values, x.numpy())
    np.testing.assert_array_equal(group(raw, "sample_stats")["log_weight"].values, counts.log().numpy())
    with pytest.raises(OptionError, match="netcdf"):
        to(posterior, "netcdf")


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_clash(format: str) -> None:
    """A site named like its plate, like a leading axis, one plate of two sizes, one axis twice, a path as a name."""
    posterior = Posterior(
        {
            "school": normal(2, 5, 8),
            "chain": normal(2, 5),
            "net/w": normal(2, 5, 3, 3),
            "part": normal(2, 5, 4),
            "whole": normal(2, 5, 9),
        },
        dims={"school": ("school",), "net/w": ("unit", "unit"), "part": ("data",), "whole": ("data",)},
        coords={"school": list("abcdefgh")},
    )
    draws = group(to(posterior, format), "posterior")
    assert draws["school"].dims == ("chain", "draw", "school_dim")
    assert draws["school_dim"].values.tolist() == list("abcdefgh")
    assert draws["chain_2"].dims == ("chain", "draw")
    assert draws["net|w"].dims == ("chain", "draw", "unit", "unit_dim")
    assert draws["part"].dims == ("chain", "draw", "data")
    assert draws["whole"].dims[2] not in ("data", "whole")
    for name, own in {"school": "school", "chain_2": "chain", "net|w": "net/w", "whole": "whole"}.items():
        np.testing.assert_array_equal(draws[name].values, posterior[own].numpy())


@pytest.mark.parametrize("format", FORMATS)
def test_problems_in_arviz(format: str) -> None:
    x = normal(3, 2, 5, 4)
    draws = group(to(Posterior({"x": x}, attrs={"problems": 3}), format), "posterior")
    assert draws["x"].dims == ("chain", "draw", "problem", "x_dim_0")
    np.testing.assert_array_equal(draws["x"].values[:, :, 2], x[2].numpy())
    counts = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])
    two = Posterior({"x": torch.arange(4.0).reshape(2, 1, 2)}, log_weight=counts.log(), attrs={"problems": 2})
    assert group(to(two, format), "posterior")["x"].values.tolist() == [[[0, 2], [1, 2]]]
