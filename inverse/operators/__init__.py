"""Linear operators of inverse problems: what was measured, as torch modules.

A(x)   A.adjoint(y)   A.pinv(y)   A.svd()   A.solve_gram(r, noise_var, prior_var)   A @ B   A + B   2 * A   stack(A, B)
beside(A, B)
"""

from __future__ import annotations

from inverse.operators.algebra import Compose, Scaled, Stack, Sum, stack
from inverse.operators.base import LinearOperator
from inverse.operators.beside import Beside, Zero, beside
from inverse.operators.blur import CircularBlur, GaussianBlur, MotionBlur
from inverse.operators.calls import CallRecord, record_calls
from inverse.operators.decomposition import SVD
from inverse.operators.demosaic import ColourMosaic
from inverse.operators.dense import Dense, FunctionOperator, probe_affine, probe_linear
from inverse.operators.downsample import Downsample
from inverse.operators.fourier import FourierMask
from inverse.operators.jpeg import JPEG, round_through
from inverse.operators.linear_solve import ConvergenceError, Solution, conjugate_gradient
from inverse.operators.mask import Diagonal, Identity, Mask
from inverse.operators.mri import MultiCoilMRI, coil_sensitivities
from inverse.operators.nonlinear import Clip, GammaBlur, NonlinearOperator, SaturatingBlur
from inverse.operators.phase_retrieval import PhaseRetrieval
from inverse.operators.radon import Radon
from inverse.operators.scattering import BornScattering, MultipleScattering
from inverse.operators.sensing import GaussianSensing, SubsampledCosine, SubsampledHadamard
from inverse.operators.varying_blur import VaryingBlur
from inverse.operators.wrap import WrappedPhysics, adjoint_error, wrap

__all__ = [
    "JPEG",
    "SVD",
    "Beside",
    "BornScattering",
    "CallRecord",
    "CircularBlur",
    "Clip",
    "ColourMosaic",
    "Compose",
    "ConvergenceError",
    "Dense",
    "Diagonal",
    "Downsample",
    "FourierMask",
    "FunctionOperator",
    "GammaBlur",
    "GaussianBlur",
    "GaussianSensing",
    "Identity",
    "LinearOperator",
    "Mask",
    "MotionBlur",
    "MultiCoilMRI",
    "MultipleScattering",
    "NonlinearOperator",
    "PhaseRetrieval",
    "Radon",
    "SaturatingBlur",
    "Scaled",
    "Solution",
    "Stack",
    "SubsampledCosine",
    "SubsampledHadamard",
    "Sum",
    "VaryingBlur",
    "WrappedPhysics",
    "Zero",
    "adjoint_error",
    "beside",
    "coil_sensitivities",
    "conjugate_gradient",
    "probe_affine",
    "probe_linear",
    "record_calls",
    "round_through",
    "stack",
    "wrap",
]
