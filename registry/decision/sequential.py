"""A difference of two arms whose requests come in clusters, and bounds on it that hold at every look. NumPy.

What is estimated: in each step of a rollout the share of people who get the candidate is constant, so within a step
both arms see the same hours; over steps they do not (Crook, Frasca, Kohavi and Longbotham, "Seven Pitfalls to Avoid
when Running Controlled Experiments on the Web", KDD 2009, on ramp-up). The difference is therefore taken in each step
and averaged with the weights of Mantel and Haenszel, n_c n_l / (n_c + n_l), as Greenland and Robins (Biometrics 41,
1985) do for differences of risks.

Its variance: requests of one person are alike, and a person who comes back is no new one. All that a cluster adds over
all steps is one term; the variance is the sum of their squares (Liang and Zeger, Biometrika 73, 1986), with as many
degrees of freedom as clusters count (Carter, Schnepel and Steigerwald, Review of Economics and Statistics 99, 2017;
Satterthwaite, Biometrics Bulletin 2, 1946), and never less than independent requests at the limit itself would have.

Its bounds: the mixture sequential probability ratio test of Robbins (Annals of Mathematical Statistics 41, 1970) with a
half-normal mixture, in the closed form of Howard, Ramdas, McAuliffe and Sekhon ("Time-uniform, nonparametric,
nonasymptotic confidence sequences", Annals of Statistics 49, 2021), on an estimate that is normal in large samples
(Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences", Annals of Statistics 52, 2024). The clock is the information, 1 / variance: in it an efficient estimate has
independent increments, also from people who keep coming back (Scharfstein, Tsiatis and Robins, Journal of the American
Statistical Association 92, 1997). How often it is wrong is measured: docs/rollout-decisions.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FEWEST_CLUSTERS = 5.0
"""Effective clusters of an arm below which nothing is shown."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """An estimate, its variance and what stands behind it; arrays over whatever was compared side by side."""

    estimate: Array
    variance: Array
    """Infinite where nothing can be said."""
    freedom: Array
    """Degrees of freedom of the variance."""

    def bound(self, alpha: float, scale: float) -> Array:
        """How far the truth lies from the estimate on one side, at any time at all but with probability alpha.

        Args:
            alpha: Of one side.
            scale: The difference that matters, in the unit of the estimate. Bounds are tightest where the standard
                error is still twice as large, and valid everywhere: they lose little with more, and much with less
                information, of which a few people never bring more.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            information = 1 / self.variance
            z = threshold(information, alpha, (0.5 / scale) ** 2)
            margin = student(z, self.freedom) * np.sqrt(self.variance)
        return np.where(np.isfinite(self.variance), margin, np.inf)


def threshold(information: Array, alpha: float, tuned_for: float) -> Array:
    """Standard errors that a process of mean zero is never above, at any time, but with probability alpha.

    The mixture over drifts is half-normal with variance 1 / rho: its martingale at z standard errors is
    2 sqrt(rho / (v + rho)) exp(x^2 / 2) Phi(x) with x = z sqrt(v / (v + rho)), and Phi(x) >= 1 - exp(-x^2 / 2) / 2.
    It reaches 1 / alpha at x^2 = 2 log(1 + sqrt((v + rho) / rho) / (2 alpha)) or before.

    Args:
        information: v, of any shape: 1 / variance of the estimate.
        alpha: Of one side.
        tuned_for: Information at which the bound is tightest.
    """
    rho = tuned_for / (-2 * np.log(alpha) + np.log(-2 * np.log(alpha)) + 1)
    with np.errstate(divide="ignore"):
        wider = 1 + rho / information
    found: Array = np.sqrt(2 * wider * np.log1p(np.sqrt(1 + information / rho) / (2 * alpha)))
    return found


def student(z: Array, freedom: Array) -> Array:
    """The quantile of Student's distribution as improbable as z is of the normal one. Same shapes."""
    from scipy import special

    found: Array = np.where(
        z < 37, -special.stdtrit(np.maximum(freedom, 1e-3), special.ndtr(-np.minimum(z, 37))), np.inf
    )
    return found


def contrast(
    candidate: Array, live: Array, *, times: float, spread: Array | None = None, margin: float | None = None
) -> Contrast:
    """The candidate's mean minus `times` live's, over all steps.

    Args:
        candidate: Requests and sum of their values, shape (..., steps, 2, clusters).
        live: The same of the live release; the same clusters in the same order, and the same steps.
        times: How often live's mean counts; 0 asks the candidate alone, and then no step needs live.
        spread: Variance of single requests' values, shape (...), below which the estimate's is not taken.
        margin: Given for values that are 0 or 1: what the difference is held against. Requests that were independent
            and just at it say how small the variance may be.
    """
    n_c, s_c, n_l, s_l = candidate[..., 0, :], candidate[..., 1, :], live[..., 0, :], live[..., 1, :]
    all_c, all_l = n_c.sum(-1), n_l.sum(-1)
    sum_c, sum_l = s_c.sum(-1), s_l.sum(-1)
    one_c, one_l = np.maximum(all_c, 1), np.maximum(all_l, 1)
    weight = all_c * all_l / np.maximum(all_c + all_l, 1) if times else all_c
    total = weight.sum(-1)
    weight = weight / np.maximum(total, 1e-12)[..., None]
    estimate = (weight * (sum_c / one_c - times * sum_l / one_l)).sum(-1)

    per_c, per_l = weight / one_c, times * weight / one_l
    adds_c = _over_steps(per_c, s_c) - _over_steps(per_c * sum_c / one_c, n_c)
    adds_l = _over_steps(per_l, s_l) - _over_steps(per_l * sum_l / one_l, n_l)
    clusters_c, clusters_l = _effective(_over_steps(per_c, n_c)), _effective(_over_steps(per_l, n_l))
    fewest = np.minimum(clusters_c, clusters_l) if times else clusters_c
    enlarged = fewest / np.maximum(fewest - 1, 1e-3)
    variance_c, variance_l = (adds_c**2).sum(-1) * enlarged, (adds_l**2).sum(-1) * enlarged
    variance = ((adds_c - adds_l) ** 2).sum(-1) * enlarged

    at_least_c, at_least_l = (per_c**2 * all_c).sum(-1), (per_l**2 * all_l).sum(-1)
    if margin is not None:
        rate_c, rate_l = (weight * sum_c / one_c).sum(-1), (weight * sum_l / one_l).sum(-1)
        at_limit = np.clip(times * rate_l + margin, 0, 0.5)
        least = at_least_c * np.maximum(at_limit * (1 - at_limit), rate_c * (1 - rate_c)) + at_least_l * rate_l * (
            1 - rate_l
        )
    else:
        least = (at_least_c + at_least_l) * (spread if spread is not None else 0.0)
    variance = np.maximum(variance, least)

    ends_c, ends_l = np.maximum(clusters_c - 1, 1e-3), np.maximum(clusters_l - 1, 1e-3)
    parts = variance_c**2 / ends_c + variance_l**2 / ends_l
    freedom = np.where(parts > 0, (variance_c + variance_l) ** 2 / np.where(parts > 0, parts, 1), fewest - 1)
    sayable = (total > 0) & (fewest >= FEWEST_CLUSTERS) & (variance > 0)
    return Contrast(
        estimate=estimate,
        variance=np.where(sayable, variance, np.inf),
        freedom=np.maximum(freedom, 1.0),
    )


def _over_steps(factors: Array, values: Array) -> Array:
    """Values of shape (..., steps, clusters), each step times its factor (..., steps), summed over the steps."""
    found: Any = np.einsum("...k,...ki->...i", factors, values)
    return found  # type: ignore[no-any-return]


def _effective(weights: Array) -> Array:
    """How many clusters of one size count as much as these (Kish, "Survey Sampling", 1965). Over the last axis."""
    squares = (weights**2).sum(-1)
    found: Array = np.where(squares > 0, weights.sum(-1) ** 2 / np.where(squares > 0, squares, 1), 0)
    return found
