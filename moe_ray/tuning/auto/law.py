"""The scaling law of a ladder of runs, its fit, and how far the runs leave it open.

    L = (E + A / M^alpha + B / D^beta) * exp(q (ln lr - ln lr*)^2 + p (ln b - ln b*)^2)
    M = N * (N_total / N)^s * G^g * exp(h * shared)
    ln lr* = l0 + l1 ln(C / C0)        ln b* = b0 + b1 ln(C / C0)

of N active parameters, D tokens, C = FLOPs, G experts a token (finer ones the more there are, at equal width
together) and b tokens a batch. The first line without its exponential is Hoffmann et al. 2022; M is the size of
the dense model of equal loss, as in Clark et al. 2022, with the power of granularity that Krajewski et al. 2024
found; the optima of learning rate and batch are powers of compute, as in DeepSeek-AI 2024 (DeepSeek LLM, 3.1).

A few dozen runs leave such a law open, so each parameter has a normal prior at what these papers found. The fit is
the most probable law: log residuals with Huber's weights (Hoffmann et al. 2022, appendix D), and the priors'. What
is open is sampled by randomize-then-optimize (Bardsley et al. 2014), a parametric bootstrap in which the priors
are drawn anew as well: each sample is the fit to losses with drawn noise and to drawn priors.

Shapes: N runs, M points to predict, P parameters, R samples.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np

# Mean and deviation of the priors. a and b are A / M^alpha and B / D^beta at the ladder's middle, in nats; optima
# are relative to the middle of what was tried.
PRIORS = {
    "ln_E": (np.log(1.7), 0.5),
    "ln_a": (0.0, 1.0),
    "ln_alpha": (np.log(0.34), 0.3),
    "ln_b": (0.5, 1.0),
    "ln_beta": (np.log(0.28), 0.3),
    "s": (0.4, 0.25),
    "g": (0.1, 0.2),
    "h": (0.0, 0.2),
    "l0": (0.0, 1.0),
    "l1": (-0.125, 0.1),
    "ln_q": (np.log(0.02), 1.0),
    "b0": (0.0, 1.5),
    "b1": (0.327, 0.1),
    "ln_p": (np.log(0.01), 1.0),
}
_MEAN_P, _DEVIATION_P = np.array(list(PRIORS.values())).T
# What the noise of log losses is thought to be, and how many runs this guess weighs.
_NOISE, _NOISE_RUNS = 0.01, 4
_HUBER = 1.5
_ROUNDS = 6
_MOST_STEPS = 60
_CONVERGED = 1e-5


@dataclass(frozen=True)
class Points:
    """Runs, made or to be predicted.

    Logarithms [M] of active parameters, of total over active ones, of experts a token, of tokens, FLOPs, learning
    rate and tokens a batch; and shared experts [M].
    """

    active: np.ndarray
    sparsity: np.ndarray
    granularity: np.ndarray
    shared: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    lr: np.ndarray
    batch: np.ndarray

    def __len__(self) -> int:
        return len(self.active)

    def take(self, chosen: np.ndarray) -> Self:
        """Those at indices or under a mask."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


@dataclass(frozen=True)
class Law:
    """The fitted law.

    Attributes:
        middle: means of the runs, from which all logarithms are measured.
        best_P: the most probable parameters.
        samples_RP: parameters that the runs leave possible.
        noise_R: deviation of the log loss of a run, of each sample.
    """

    middle: dict[str, float]
    best_P: np.ndarray
    samples_RP: np.ndarray
    noise_R: np.ndarray

    def predict(self, points: Points) -> np.ndarray:
        """Log losses [R, M], without a run's noise."""
        return _log_loss(self.samples_RP, points, self.middle)

    def best(self, points: Points) -> np.ndarray:
        """Log losses [M] of the most probable law."""
        return _log_loss(self.best_P[None], points, self.middle)[0]

    def optimum(self, log_flops: float) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms [R] of the best learning rate and of the best tokens a batch."""
        value, compute = _columns(self.samples_RP), log_flops - self.middle["flops"]
        lr = self.middle["lr"] + value["l0"] + value["l1"] * compute
        return lr[:, 0], (self.middle["batch"] + value["b0"] + value["b1"] * compute)[:, 0]

    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """By name: most probable value, and the ends of the interval that holds 90%."""
        low_P, high_P = np.quantile(self.samples_RP, (0.05, 0.95), axis=0)
        rows = zip(PRIORS, self.best_P.tolist(), low_P.tolist(), high_P.tolist(), strict=True)
        return {name: tuple(values) for name, *values in rows}


def fit_law(points: Points, losses_N: np.ndarray, *, samples: int = 200, seed: int = 0) -> Law:
    """The law of runs with these losses."""
    middle = {field.name: float(getattr(points, field.name).mean()) for field in fields(points)}
    target_N, weights_N = np.log(losses_N), np.ones(len(points))
    problem = _Problem(points, middle, target_N[None], weights_N[None] / _NOISE, _MEAN_P[None])
    best_1P = _MEAN_P[None]
    for _ in range(_ROUNDS):
        best_1P = _minimise(problem, best_1P)
        residual_N = target_N - _log_loss(best_1P, points, middle)[0]
        jacobian = _jacobian(problem, best_1P)[0]
        # As many parameters as the runs, not the priors, decide.
        of_runs = jacobian[: len(points)].T @ jacobian[: len(points)]
        freedom = _NOISE_RUNS + len(points) - float(np.trace(np.linalg.solve(jacobian.T @ jacobian, of_runs)))
        squares = _NOISE_RUNS * _NOISE**2 + float(weights_N @ residual_N**2)
        noise = np.sqrt(squares / freedom)
        weights_N = np.minimum(1.0, _HUBER * noise / np.maximum(np.abs(residual_N), 1e-12))
        problem = replace(problem, scale_RN=np.sqrt(weights_N)[None] / noise)
    rng = np.random.default_rng(seed)
    noise_R = np.sqrt(squares / rng.chisquare(freedom, samples))
    scale_RN = np.sqrt(weights_N) / noise_R[:, None]
    noisy_RN = target_N + rng.standard_normal(scale_RN.shape) / scale_RN
    priors_RP = _MEAN_P + _DEVIATION_P * rng.standard_normal((samples, len(PRIORS)))
    drawn = replace(problem, target_RN=noisy_RN, scale_RN=scale_RN, prior_RP=priors_RP)
    samples_RP = _minimise(drawn, np.repeat(best_1P, samples, axis=0))
    return Law(middle, best_1P[0], samples_RP, noise_R)


@dataclass(frozen=True)
class _Problem:
    """R fits of the same runs: log losses, one over their deviations, and means of the priors."""

    points: Points
    middle: dict[str, float]
    target_RN: np.ndarray
    scale_RN: np.ndarray
    prior_RP: np.ndarray

    def residuals(self, values_RP: np.ndarray) -> np.ndarray:
        """What is minimised the squares of [R, N + P], in deviations."""
        misfit_RN = (_log_loss(values_RP, self.points, self.middle) - self.target_RN) * self.scale_RN
        return np.concatenate([misfit_RN, (values_RP - self.prior_RP) / _DEVIATION_P], axis=1)


def _minimise(problem: _Problem, start_RP: np.ndarray) -> np.ndarray:
    """Parameters [R, P] of all fits at once, by Levenberg and Marquardt's method."""
    values_RP, damping_R = start_RP, np.full(len(start_RP), 1e-2)
    residual = problem.residuals(values_RP)
    for _ in range(_MOST_STEPS):
        jacobian = _jacobian(problem, values_RP)
        normal = jacobian.transpose(0, 2, 1) @ jacobian
        damped = normal + damping_R[:, None, None] * normal * np.eye(len(PRIORS))
        gradient = jacobian.transpose(0, 2, 1) @ residual[:, :, None]
        tried_RP = values_RP - np.linalg.solve(damped, gradient)[:, :, 0]
        tried = problem.residuals(tried_RP)
        gain_R = (residual**2).sum(axis=1) - (tried**2).sum(axis=1)
        better_R = gain_R > 0
        values_RP = np.where(better_R[:, None], tried_RP, values_RP)
        residual = np.where(better_R[:, None], tried, residual)
        damping_R = np.clip(np.where(better_R, damping_R / 5, damping_R * 5), 1e-9, 1e9)
        if (np.abs(gain_R) < _CONVERGED).all():
            break
    return values_RP


def _jacobian(problem: _Problem, values_RP: np.ndarray) -> np.ndarray:
    """Derivatives [R, N + P, P] of the residuals."""
    base, step = problem.residuals(values_RP), 1e-6
    columns = [(problem.residuals(values_RP + step * unit_P) - base) / step for unit_P in np.eye(len(PRIORS))]
    return np.stack(columns, axis=2)


def _columns(values_RP: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters [R, 1] by name."""
    return dict(zip(PRIORS, values_RP.T[:, :, None], strict=True))


def _log_loss(values_RP: np.ndarray, points: Points, middle: dict[str, float]) -> np.ndarray:
    value = _columns(values_RP)
    at = {field.name: (getattr(points, field.name) - middle[field.name])[None] for field in fields(points)}
    size = at["active"] + value["s"] * at["sparsity"] + value["g"] * at["granularity"] + value["h"] * at["shared"]
    # Far from any run a step of the search may overflow.
    with np.errstate(over="ignore"):
        floor = np.exp(value["ln_E"])
        of_size = np.exp(value["ln_a"] - np.exp(value["ln_alpha"]) * size)
        of_tokens = np.exp(value["ln_b"] - np.exp(value["ln_beta"]) * at["tokens"])
        rate = at["lr"] - value["l0"] - value["l1"] * at["flops"]
        batch = at["batch"] - value["b0"] - value["b1"] * at["flops"]
        excess = np.exp(value["ln_q"]) * rate**2 + np.exp(value["ln_p"]) * batch**2
    return np.clip(np.log(floor + of_size + of_tokens) + excess, -20, 20)
