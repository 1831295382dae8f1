"""How much of the objective each setting decides, over what chance makes of it.

Trials are ranked by objective and grouped by a setting: by value, numbers with more than four values by thirds,
trials without the setting as a group of their own. The importance is the share of the variance of the ranks that
lies between the groups, less that of shuffled trials: eta squared of Kruskal and Wallis,
(H - k + 1) / (n - k) for k groups of n trials (Tomczak and Tomczak 2014). p-values are by permutation, corrected
for the number of settings (`analytics/significance.py`). Ranks, because one trial that diverged says no more than
that it was the worst.

Shapes: N trials, P settings, R permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import COLOURS, short
from moe_ray.analytics.significance import max_t
from moe_ray.tuning.report.sweep import Sweep, counted, is_number, text_of

FEWEST_TRIALS = 8
_PERMUTATIONS = 2000
_MOST_VALUES = 4
_LEVEL = 0.05


@dataclass(frozen=True)
class Importance:
    """Of one setting.

    Attributes:
        share: of the variance of ranks, over chance; at most 1.
        p: corrected.
        best: the values of the group with the best mean rank.
    """

    setting: str
    share: float
    p: float
    best: str

    @property
    def is_told(self) -> bool:
        """Whether it is told from chance, at 5% of all settings together."""
        return self.p <= _LEVEL


def importances(sweep: Sweep) -> list[Importance]:
    """Of every setting that took several values, the largest first; none of fewer than eight trials."""
    trials = sweep.measured
    values = {name: [trial.values.get(name) for trial in trials] for name in sweep.settings}
    groups = {name: _groups(of) for name, of in values.items()}
    groups = (
        {name: labels_N for name, labels_N in groups.items() if 1 < labels_N.max() + 1 < len(trials)}
        if trials
        else {}
    )
    if len(trials) < FEWEST_TRIALS or not groups:
        return []
    ranks_N = _ranks(np.array([sweep.loss(trial) for trial in trials]))
    rng = np.random.default_rng(0)
    shuffled_RN = rng.permuted(np.tile(ranks_N, (_PERMUTATIONS, 1)), axis=1)
    observed_P = np.array([_eta(ranks_N[None], labels_N)[0] for labels_N in groups.values()])
    chance_RP = np.stack([_eta(shuffled_RN, labels_N) for labels_N in groups.values()], axis=1)
    _, p_P = max_t(observed_P, chance_RP)
    best = [_best(values[name], labels_N, ranks_N) for name, labels_N in groups.items()]
    found = [Importance(*item) for item in zip(groups, observed_P.tolist(), p_P.tolist(), best, strict=True)]
    return sorted(found, key=lambda item: -item.share)


def importance_parts(sweep: Sweep) -> list[Part]:
    """The figure, or why there is none."""
    title = "Importance of the settings"
    found = importances(sweep)
    if not found:
        reason = (
            f"It takes at least {FEWEST_TRIALS} trials with an objective, of which several share a value. This "
            f"sweep has {counted(len(sweep.measured), 'trial')} with one."
        )
        return [Missing(title, reason)]
    values = [
        {
            "setting": item.setting,
            "share": short(max(0.0, item.share)),
            "told": item.is_told,
            "label": _label(item),
        }
        for item in found
    ]
    names = {"field": "setting", "type": "nominal", "sort": None, "title": None}
    spec = {
        "width": "container",
        "height": 46 * len(values),
        "data": {"values": values},
        "encoding": {
            "y": {
                **names,
                "axis": {"labels": False, "ticks": False},
                "scale": {"paddingInner": 0.6, "paddingOuter": 0.4},
            },
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the variance of ranks, over chance",
                "scale": {"domain": [0, 1]},
                "axis": {"format": "%", "tickCount": 5},
            },
        },
        "layer": [
            {
                "mark": {"type": "bar", "fill": COLOURS[0], "stroke": COLOURS[0], "strokeWidth": 1.5},
                "encoding": {"fillOpacity": {"condition": {"test": "datum.told", "value": 1}, "value": 0}},
            },
            {
                "mark": {"type": "text", "align": "left", "dy": -17},
                "encoding": {"text": {"field": "label"}, "x": {"value": 2}},
            },
        ],
    }
    text = (
        "Share of the variance of the trials' ranks that lies between the values of a setting (numbers by "
        f"thirds), less what chance makes of it; p by {_PERMUTATIONS:,} permutations, corrected for the number of "
        "settings. Hollow bars are not told from chance. Trials that were stopped count with their last objective."
    )
    rows = [
        (item.setting, short(item.share, 3), short(item.p, 3), "yes" if item.is_told else "no", item.best)
        for item in found
    ]
    table = Table(("setting", "share over chance", "p", "told from chance", "best values"), rows)
    return [Figure("importance", title, text, spec, table)]


def _label(item: Importance) -> str:
    return f"{item.setting}: {max(0.0, item.share):.0%}{'' if item.is_told else ', not told from chance'}"


def _groups(values: Sequence[Any]) -> np.ndarray:
    """Number of the group [N] of each trial."""
    known = [value for value in values if value is not None]
    if known and all(map(is_number, known)) and len(set(known)) > _MOST_VALUES:
        thirds = np.quantile(known, (1 / 3, 2 / 3))
        labels = ["" if value is None else str(np.searchsorted(thirds, value)) for value in values]
    else:
        labels = ["" if value is None else f"={text_of(value)}" for value in values]
    return np.unique(labels, return_inverse=True)[1] if labels else np.zeros(0, int)


def _best(values: Sequence[Any], labels_N: np.ndarray, ranks_N: np.ndarray) -> str:
    """The values, or their range, of the group with the best mean rank."""
    group = np.argmin(np.bincount(labels_N, ranks_N) / np.bincount(labels_N))
    members = [value for value, label in zip(values, labels_N, strict=True) if label == group]
    if all(map(is_number, members)) and min(members) < max(members):
        return f"{text_of(min(members))} to {text_of(max(members))}"
    return "not set" if members[0] is None else text_of(members[0])


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks [N] with equal ones for equal values."""
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse_N]


def _eta(ranks_RN: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Eta squared [R] of ranks; 0 on average over permutations."""
    count, groups = len(labels_N), int(labels_N.max()) + 1
    members = np.eye(groups)[labels_N]
    centred_RN = ranks_RN - ranks_RN.mean(axis=1, keepdims=True)
    between_R = ((centred_RN @ members) ** 2 / members.sum(axis=0)).sum(axis=1)
    variance = (centred_RN[0] ** 2).sum() / (count - 1)
    return (between_R / max(variance, 1e-12) - groups + 1) / (count - groups)
