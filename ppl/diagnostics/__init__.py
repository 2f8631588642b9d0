"""Measures of how good draws are: distances to exact draws, scores, coverage, calibration, effective sample sizes."""

from __future__ import annotations

from ppl.diagnostics.calibration import SBC, default_test_functions, log_likelihood, sbc
from ppl.diagnostics.coverage import Coverage, central_coverage, inside_central, projected_coverage, ranks
from ppl.diagnostics.energy import SpreadSkill, crps, energy_distance, energy_score, spread_skill
from ppl.diagnostics.ess import (
    ess_of,
    kish_ess,
    log_evidence_stderr,
    merge_root_ess,
    pareto_khat,
    root_ess,
    root_weights,
    z_bound,
)
from ppl.diagnostics.ksd import KSDTest, ksd_test, stein_kernel
from ppl.diagnostics.mmd import MMDTest, mmd_squared, mmd_test
from ppl.diagnostics.rank_tests import chi_square_p_value, ecdf_band, ecdf_p_value, ecdf_p_values
from ppl.diagnostics.sliced import (
    Floor,
    FloorRatio,
    max_sliced_wasserstein,
    random_directions,
    sliced_over_floor,
    sliced_wasserstein,
    sliced_wasserstein_floor,
    wasserstein_1d,
)

__all__ = [
    "SBC",
    "Coverage",
    "Floor",
    "FloorRatio",
    "KSDTest",
    "MMDTest",
    "SpreadSkill",
    "central_coverage",
    "chi_square_p_value",
    "crps",
    "default_test_functions",
    "ecdf_band",
    "ecdf_p_value",
    "ecdf_p_values",
    "energy_distance",
    "energy_score",
    "ess_of",
    "inside_central",
    "kish_ess",
    "ksd_test",
    "log_evidence_stderr",
    "log_likelihood",
    "max_sliced_wasserstein",
    "merge_root_ess",
    "mmd_squared",
    "mmd_test",
    "pareto_khat",
    "projected_coverage",
    "random_directions",
    "ranks",
    "root_ess",
    "root_weights",
    "sbc",
    "sliced_over_floor",
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "spread_skill",
    "stein_kernel",
    "wasserstein_1d",
    "z_bound",
]
