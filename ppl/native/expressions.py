"""C expressions of elementwise operations, and the few functions that the C library lacks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["CTYPES", "POINTWISE", "PRELUDE", "literal"]

CTYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}

# Branches choose between values that are both computed, so that loops stay vector loops.
PRELUDE = r"""
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef VECTOR_MATH
#define VECTOR __attribute__((simd("notinbranch")))
VECTOR double exp(double);
VECTOR double log(double);
VECTOR double sin(double);
VECTOR double cos(double);
VECTOR double pow(double, double);
VECTOR double log1p(double);
VECTOR double expm1(double);
VECTOR double tanh(double);
VECTOR double erf(double);
VECTOR double erfc(double);
VECTOR double atan(double);
#endif
typedef struct { int64_t gradients, stored; char *work; const void *in[]; } State;
static inline double sigmoid_(double x) { return 1 / (1 + exp(-x)); }
static inline double softplus_(double x, double b, double most) {
  double soft = log1p(exp(x * b)) / b; return x * b > most ? x : soft; }
static inline double softplus_backward_(double g, double x, double b, double most) {
  double z = exp(x * b), soft = g * z / (z + 1); return x * b > most ? g : soft; }
static inline double log_sigmoid_(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }
static inline double log_sigmoid_backward_(double g, double x) {
  double z = exp(-fabs(x)), part = z / (1 + z); return g * (x < 0 ? 1 - part : part); }
static inline double xlogy_(double a, double b) { double y = a * log(b); return b != b ? b : a == 0 ? 0 : y; }
static inline double xlog1py_(double a, double b) { double y = a * log1p(b); return b != b ? b : a == 0 ? 0 : y; }
static inline double logaddexp_(double a, double b) {
  double m = a > b ? a : b, soft = m + log1p(exp(-fabs(a - b))); return a == b && isinf(a) ? a : soft; }
static inline double lgamma_(double x) { int sign; return lgamma_r(x, &sign); }
static double digamma_(double x) {
  double below = 0, f, s;
  if (x == 0) return copysign(INFINITY, -x);
  if (x < 0) {
    if (x == floor(x)) return NAN;
    return digamma_(1 - x) - M_PI / tan(M_PI * (x - floor(x)));
  }
  while (x < 10) { below -= 1 / x; x += 1; }
  f = 1 / (x * x);
  s = f * (1. / 12 - f * (1. / 120 - f * (1. / 252 - f * (1. / 240 - f * (1. / 132 - f * (691. / 32760 - f / 12))))));
  return below + log(x) - 0.5 / x - s;
}
/* l (n, n) with l l' = a; strides of a and l. */
static void cholesky_(const double *a, int64_t ar, int64_t ac, double *l, int64_t r, int64_t c, int64_t n,
                      int32_t *info) {
  *info = 0;
  for (int64_t i = 0; i < n; i++) for (int64_t j = i + 1; j < n; j++) l[i * r + j * c] = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++) {
      double s = a[i * ar + j * ac];
      for (int64_t k = 0; k < j; k++) s -= l[i * r + k * c] * l[j * r + k * c];
      if (i == j) { if (!(s > 0) && !*info) *info = (int32_t)(i + 1); l[i * r + i * c] = sqrt(s); }
      else l[i * r + j * c] = s / l[j * r + j * c];
    }
}
/* x (n, m) from op(a) x = b; strides of a, b and x. */
static void solve_(const double *a, int64_t ar, int64_t ac, const double *b, int64_t br, int64_t bc, double *x,
                   int64_t xr, int64_t xc, int64_t n, int64_t m, int upper, int unit) {
  for (int64_t t = 0; t < n; t++) {
    int64_t i = upper ? n - 1 - t : t, from = upper ? i + 1 : 0, to = upper ? n : i;
    for (int64_t j = 0; j < m; j++) {
      double s = b[i * br + j * bc];
      for (int64_t k = from; k < to; k++) s -= a[i * ar + k * ac] * x[k * xr + j * xc];
      x[i * xr + j * xc] = unit ? s : s / a[i * ar + i * ac];
    }
  }
}
#define ROW static void
ROW logsumexp_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double m = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) m = (x[i * s] > m || x[i * s] != x[i * s]) ? x[i * s] : m;
  if (isinf(m)) m = 0;
  for (int64_t i = 0; i < n; i++) sum += exp(x[i * s] - m);
  y[0] = m + log(sum); }
ROW amax_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double m = x[0];
  for (int64_t i = 1; i < n; i++) m = (x[i * s] > m || x[i * s] != x[i * s]) ? x[i * s] : m;
  y[0] = m; }
ROW amin_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double m = x[0];
  for (int64_t i = 1; i < n; i++) m = (x[i * s] < m || x[i * s] != x[i * s]) ? x[i * s] : m;
  y[0] = m; }
ROW cumsum_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) y[i * t] = sum += x[i * s]; }
ROW cumprod_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double all = 1;
  for (int64_t i = 0; i < n; i++) y[i * t] = all *= x[i * s]; }
ROW prod_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double all = 1;
  for (int64_t i = 0; i < n; i++) all *= x[i * s];
  y[0] = all; }
ROW _log_softmax_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double whole;
  logsumexp_(x, s, &whole, 1, n);
  for (int64_t i = 0; i < n; i++) y[i * t] = x[i * s] - whole; }
ROW _softmax_(const double *x, int64_t s, double *y, int64_t t, int64_t n) {
  double whole;
  logsumexp_(x, s, &whole, 1, n);
  for (int64_t i = 0; i < n; i++) y[i * t] = exp(x[i * s] - whole); }
"""


def literal(number: float | bool, floating: bool) -> str:
    """A number in C.

    Example:
        >>> literal(-0.5, True), literal(3, False), literal(float("inf"), True)
        ('(-0.5)', '3', 'INFINITY')
    """
    if isinstance(number, bool) or (not floating and isinstance(number, int)):
        return str(int(number)) if number >= 0 else f"({int(number)})"
    value = float(number)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return repr(value) if math.copysign(1, value) > 0 else f"({value!r})"


def _power(a: str, b: str) -> str:
    short = {"2.0": f"{a} * {a}", "3.0": f"{a} * {a} * {a}", "0.5": f"sqrt({a})", "1.0": a}
    short |= {"(-1.0)": f"1 / {a}", "(-2.0)": f"1 / ({a} * {a})", "(-0.5)": f"1 / sqrt({a})"}
    return short.get(b) or f"pow({a}, {b})"


def _clamp(x: str, low: str | None = None, high: str | None = None) -> str:
    upper = x if high is None else f"({x} > {high} ? {high} : {x})"
    return upper if low is None else f"{x} < {low} ? {low} : {upper}"


def _scaled(sign: str) -> Callable[..., str]:
    def write(a: str, b: str, alpha: str | None = None) -> str:
        return f"{a} {sign} {b}" if alpha is None else f"{a} {sign} {alpha} * {b}"

    return write


def _call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


def _between(sign: str) -> Callable[..., str]:
    return lambda a, b: f"{a} {sign} {b}"


POINTWISE: dict[str, Callable[..., str]] = {
    **{name: _call(name) for name in ("exp", "log", "log1p", "expm1", "sqrt", "sin", "cos", "tan", "sinh", "cosh")},
    **{
        name: _call(name) for name in ("tanh", "asin", "acos", "atan", "atan2", "erf", "erfc", "floor", "ceil", "trunc")
    },
    **{
        name: _call(name) for name in ("log2", "log10", "exp2", "asinh", "acosh", "atanh", "isnan", "isinf", "isfinite")
    },
    **{name: _call(f"{name}_") for name in ("sigmoid", "lgamma", "digamma", "xlogy", "logaddexp")},
    **{name: _between(sign) for name, sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}.items()},
    **{name: _between(sign) for name, sign in {"ne": "!=", "mul": "*", "div": "/", "logical_and": "&&"}.items()},
    **{name: _between(sign) for name, sign in {"logical_or": "||", "bitwise_and": "&", "bitwise_or": "|"}.items()},
    "special_xlog1py": _call("xlog1py_"),
    "add": _scaled("+"),
    "sub": _scaled("-"),
    "rsub": lambda a, b, alpha=None: _scaled("-")(b, a, alpha),
    "neg": lambda a: f"-{a}",
    "abs": _call("fabs"),
    "square": lambda a: f"{a} * {a}",
    "rsqrt": lambda a: f"1 / sqrt({a})",
    "reciprocal": lambda a: f"1 / {a}",
    "sgn": lambda a: f"({a} > 0) - ({a} < 0)",
    "sign": lambda a: f"({a} > 0) - ({a} < 0)",
    "relu": lambda a: f"{a} < 0 ? 0 : {a}",
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "maximum": lambda a, b: f"({a} > {b} || {a} != {a}) ? {a} : {b}",
    "minimum": lambda a, b: f"({a} < {b} || {a} != {a}) ? {a} : {b}",
    "logical_not": lambda a: f"!{a}",
    "where": lambda c, a, b: f"{c} ? {a} : {b}",
    "masked_fill": lambda a, c, b: f"{c} ? {b} : {a}",
    "softplus": lambda x, b="1.0", most="20.0": f"softplus_({x}, {b}, {most})",
    "softplus_backward": _call("softplus_backward_"),
    "sigmoid_backward": lambda g, y: f"{g} * (1 - {y}) * {y}",
    "tanh_backward": lambda g, y: f"{g} * (1 - {y} * {y})",
    "threshold_backward": lambda g, x, at: f"{x} <= {at} ? 0 : {g}",
    "log_sigmoid_backward": lambda g, x, kept: f"log_sigmoid_backward_({g}, {x})",
    "addcmul": lambda a, b, c, value="1.0": f"{a} + {value} * {b} * {c}",
    "addcdiv": lambda a, b, c, value="1.0": f"{a} + {value} * ({b} / {c})",
}
"""Operation -> expression of its arguments, each of which is a name, a number or in brackets."""
