"""The Beta posterior of a prompt's success rate, as pure functions of arrays.

Legend: every array has one axis, P = prompts. ``alpha`` and ``beta`` are pseudo-counts (> 0), v̂ = α/(α+β) in (0, 1),
    n_eff = α+β in
observations, ρ in (0, 1] is the share of old evidence that a new observation keeps, z is dimensionless drift (policy
change over D_half).

Sources: Single-stream Policy Optimization, arXiv 2509.13232 (P), the reference recipe in verl-recipe ``spo/`` (R),
    SPO++, arXiv 2608.24870 (S+).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

Floats = NDArray[np.float64]
RetentionMode = Literal["constant", "kl", "event", "drift"]

FLOOR = 1e-12
"""Least pseudo-count: thousands of equal rewards would otherwise underflow to 0, and v̂ would leave (0, 1)."""


@dataclass(frozen=True)
class Retention:
    """How fast old evidence fades: ρ of one update.

    Args:
        mode: ``constant``: a number. ``kl`` (R): clip(2^(−D/D_half)). ``event`` (S+): rho_event^(policy versions
            since the last evidence), not
            clipped. ``drift``: clip(2^(−max(0, z − z_last))).
        rho_constant: ρ of ``constant``.
        rho_min: floor of ``kl`` and ``drift`` (P: 0.875, a window of 8 observations).
        rho_max: ceiling of ``kl`` and ``drift`` (P: 0.96, a window of 25); also ρ where there is no earlier evidence
            to compare with.
        rho_event: ρ of one policy version in ``event`` (S+: 0.875).
        d_half: mean |Δ log p| that halves old evidence (R: 0.06), for ``kl``.
    """

    mode: RetentionMode = "drift"
    rho_constant: float = 0.92
    rho_min: float = 0.875
    rho_max: float = 0.96
    rho_event: float = 0.875
    d_half: float = 0.06

    def rho(
        self, z: ArrayLike, z_last: ArrayLike, version: ArrayLike, version_last: ArrayLike, kl: ArrayLike
    ) -> Floats:
        """ρ of updates, [P].

        Args:
            z: [P] drift clock at each trajectory's version.
            z_last: [P] greatest z among the prompt's earlier evidence; NaN where there is none.
            version: [P] each trajectory's policy version.
            version_last: [P] greatest version among the prompt's earlier evidence; −1 where there is none.
            kl: [P] mean |Δ log p| on the prompt's previous response, 0 on a first visit (R); NaN where it was not
                measured, and then ``kl`` goes by the clock like ``drift``.
        """
        if self.mode == "constant":
            return np.full(np.shape(z), self.rho_constant)
        if self.mode == "event":
            return np.maximum(self._event(version, version_last), FLOOR)
        halvings = _drift_since(z, z_last)
        if self.mode == "kl":
            measured = np.asarray(kl, np.float64)
            halvings = np.where(np.isnan(measured), halvings, measured / self.d_half)
        return np.asarray(np.clip(np.exp2(-halvings), self.rho_min, self.rho_max))

    def fade(self, z_now: float, z_last: ArrayLike, version_now: int, version_last: ArrayLike) -> Floats:
        """Share of each posterior's evidence that is still valid now, [P] in (0, 1]: what reading n_eff multiplies by.

        The ceiling rho_max is the price of an observation, not of time, so without drift nothing fades; the floor
        holds as in an update.
        """
        if self.mode == "event":
            return np.maximum(self._event(version_now, version_last), FLOOR)
        if self.mode == "drift":
            return np.asarray(np.maximum(np.exp2(-_drift_since(z_now, z_last)), self.rho_min))
        return np.ones(np.shape(z_last))

    def _event(self, version: ArrayLike, version_last: ArrayLike) -> Floats:
        last = np.asarray(version_last, np.float64)
        gap = np.where(last < 0, 0.0, np.maximum(0.0, np.asarray(version, np.float64) - last))
        return np.asarray(self.rho_event**gap, np.float64)


def _drift_since(z: ArrayLike, z_last: ArrayLike) -> Floats:
    gap = np.asarray(z, np.float64) - np.asarray(z_last, np.float64)
    return np.asarray(np.maximum(0.0, np.nan_to_num(gap, nan=0.0)))


def update(alpha: ArrayLike, beta: ArrayLike, rho: ArrayLike, reward: ArrayLike) -> tuple[Floats, Floats]:
    """α ← ρα + r, β ← ρβ + (1 − r) (P eq. 5), [P] each, never below `FLOOR`.

    Args:
        alpha: [P] > 0.
        beta: [P] > 0.
        rho: [P] in (0, 1].
        reward: [P] finite, in [0, 1]; the caller has refused anything else (docs/design.md, I10).
    """
    alpha, beta, rho, reward = (np.asarray(x, np.float64) for x in (alpha, beta, rho, reward))
    return np.maximum(rho * alpha + reward, FLOOR), np.maximum(rho * beta + (1.0 - reward), FLOOR)


def ema(value: ArrayLike, n_eff: ArrayLike, rho: ArrayLike, reward: ArrayLike) -> tuple[Floats, Floats]:
    """`update` as a moving average, (v̂, n_eff), [P] each: v̂ ← v̂ + η(r − v̂) with η = 1/(ρ·n_eff + 1).

    It is exact for any reward in [0, 1], not only for 0 and 1. P prints η = 1/(n_eff + 1), which forgets that n_eff
    has faded by then. The store goes by `update` alone; this form is what the papers print, and tests hold that both
    agree.

    Args:
        value: [P] v̂ in (0, 1).
        n_eff: [P] α + β > 0.
        rho: [P] in (0, 1].
        reward: [P] finite, in [0, 1].
    """
    value, n_eff, rho, reward = (np.asarray(x, np.float64) for x in (value, n_eff, rho, reward))
    grown = rho * n_eff + 1.0
    return np.asarray(value + (reward - value) / grown), grown


def v_hat(alpha: ArrayLike, beta: ArrayLike) -> Floats:
    """Posterior mean α/(α+β), [P] strictly inside (0, 1)."""
    alpha, beta = np.asarray(alpha, np.float64), np.asarray(beta, np.float64)
    return np.asarray(np.clip(alpha / (alpha + beta), FLOOR, 1.0 - FLOOR))


def shrunk(alpha: ArrayLike, beta: ArrayLike, mean: float | None, kappa: float) -> Floats:
    """v̂ = (α + κm)/(α + β + κ), [P] strictly inside (0, 1): the posterior mean, drawn towards m as by κ observations.

    Args:
        alpha: [P] > 0.
        beta: [P] > 0.
        mean: m, mean reward of the last batch, in [0, 1]; None where there is none yet, and then nothing is drawn.
        kappa: ≥ 0, in observations.
    """
    weight = 0.0 if mean is None else kappa
    pulled = weight * (mean or 0.0)
    return v_hat(np.asarray(alpha, np.float64) + pulled, np.asarray(beta, np.float64) + (weight - pulled))


def interval(alpha: ArrayLike, beta: ArrayLike, mass: float = 0.95) -> tuple[Floats, Floats]:
    """Equal-tailed credible interval from the Beta quantiles, (low, high), [P] each in [0, 1]."""
    tail = (1.0 - mass) / 2.0
    alpha, beta = np.asarray(alpha, np.float64), np.asarray(beta, np.float64)
    return np.asarray(betaincinv(alpha, beta, tail)), np.asarray(betaincinv(alpha, beta, 1.0 - tail))


def prior(reward_sum: ArrayLike, count: ArrayLike, rho_min: float) -> tuple[Floats, Floats]:
    """Prior from offline rewards (R, Jeffreys): N0 = 1/(1−ρ_min), α0 = N0(s+½)/(n+1), β0 = N0(n−s+½)/(n+1).

    Without rewards it is ½, ½.

    Args:
        reward_sum: [P] s, the sum of the rewards, each in [0, 1].
        count: [P] n ≥ 0, how many rewards.
        rho_min: floor of ρ; 0.875 makes the prior worth N0 = 8 observations.
    """
    s, n = np.asarray(reward_sum, np.float64), np.asarray(count, np.float64)
    n0 = 1.0 / (1.0 - rho_min)
    alpha, beta = n0 * (s + 0.5) / (n + 1.0), n0 * (n - s + 0.5) / (n + 1.0)
    return np.where(n > 0, alpha, 0.5), np.where(n > 0, beta, 0.5)
