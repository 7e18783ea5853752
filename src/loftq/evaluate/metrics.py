"""Metrics of classification and regression, as GLUE (Wang et al., ICLR 2019) defines and the papers print them.

    accuracy  share of predictions that equal the reference                                    in [0, 1]
    f1        2 P R / (P + R) of class 1; ``f1_macro``: its mean over all classes                in [0, 1]
    matthews  (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), or its form
              for more classes (Gorodkin 2004)                                                   in [-1, 1]
    pearson   covariance / product of the standard deviations                                    in [-1, 1]
    spearman  pearson of the ranks; ties share their mean rank                                   in [-1, 1]

The functions return these; :func:`score_labels` returns all of them times 100. Where a formula divides 0 by 0, F1 and
Matthews are 0, as in scikit-learn, and a correlation is NaN: the order of equal values says nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loftq.config import one_of
from loftq.errors import ConfigError
from loftq.optional import optional_module


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of the (n,) predictions that equal their reference."""
    found, expected = _pairs(predictions, references)
    return float(np.mean(found == expected))


def f1(predictions: ArrayLike, references: ArrayLike, average: str = "binary") -> float:
    """F1 of class 1 among (n,) labels 0 and 1, as in GLUE; with ``average="macro"`` the mean over all classes.

    Raises:
        ConfigError: for other labels than 0 and 1 with ``average="binary"``.
    """
    found, expected = _pairs(predictions, references)
    one_of("average", average, ("binary", "macro"))
    classes = np.union1d(found, expected)
    if average == "binary" and not np.isin(classes, (0, 1)).all():
        raise ConfigError(
            f"f1 is that of class 1 of 0 and 1, but the labels are {', '.join(map(str, classes[:5]))}; use f1_macro"
        )
    return _sklearn("f1_score", expected, found, average=average, zero_division=0)


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """:func:`f1` averaged over all classes that occur."""
    return f1(predictions, references, average="macro")


def matthews(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews' correlation of (n,) labels; 0 where either side holds one class only."""
    found, expected = _pairs(predictions, references)
    return _sklearn("matthews_corrcoef", expected, found)


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's correlation of (n,) values; NaN where either side is constant or not finite."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation of (n,) values; NaN where either side is constant or not finite."""
    return _correlation("spearmanr", predictions, references)


@dataclass(frozen=True)
class Metric:
    """``function(predictions, references)`` on (n,) ``"labels"`` or ``"values"``, and whether larger is better."""

    name: str
    function: Callable[[ArrayLike, ArrayLike], float]
    expects: Literal["labels", "values"]
    larger_is_better: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy, "labels"),
        Metric("f1", f1, "labels"),
        Metric("f1_macro", f1_macro, "labels"),
        Metric("matthews", matthews, "labels"),
        Metric("pearson", pearson, "values"),
        Metric("spearman", spearman, "values"),
    )
}


def score_labels(names: Iterable[str], predictions: ArrayLike, references: ArrayLike) -> dict[str, float | None]:
    """Metrics by name, times 100; ``None`` for an undefined one, as JSON has no NaN.

    Accuracy comes with its standard error ``accuracy_se``, see :func:`share_error`. The others have none here: theirs
    depend on the distribution of the data.

    Args:
        names: of :data:`METRICS`.
        predictions, references: (n,) labels or values, one a reference.

    Raises:
        ConfigError: for an unknown name, nothing to score, or unequally many predictions and references.
    """
    scores: dict[str, float | None] = {}
    for name in names:
        value = METRICS[one_of("metric", name, METRICS)].function(predictions, references)
        scores[name] = 100 * value if math.isfinite(value) else None
        if name == "accuracy":
            scores["accuracy_se"] = 100 * share_error(value, np.size(np.asarray(references)))
    return scores


def share_error(share: float, count: int) -> float:
    """Standard error sqrt(p (1 - p) / n) of a share p of n independent items that are each right or wrong.

    It is 0 for p of 0 or 1; there the true share lies within about 3 / n of p with 95 % confidence.
    """
    return math.sqrt(share * (1 - share) / count)


def mean_error(values: ArrayLike) -> float:
    """Standard error std / sqrt(n) of the mean of (n,) independent scores; 0 for a single one."""
    scores = np.asarray(values, dtype=np.float64)
    return float(scores.std(ddof=1) / math.sqrt(scores.size)) if scores.size > 1 else 0.0


def check_pairs(what: str, predictions: int, references: int) -> None:
    """A :class:`ConfigError` unless there are as many predictions as references, and any."""
    if predictions != references:
        raise ConfigError(f"there are {predictions} predictions and {references} {what}, expected one for each")
    if references == 0:
        raise ConfigError(f"there are no predictions and no {what}, expected at least one of each")


def _pairs(predictions: ArrayLike, references: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, expected = np.asarray(predictions), np.asarray(references)
    for name, array in (("predictions", found), ("references", expected)):
        if array.ndim != 1:
            raise ConfigError(f"{name} have shape {array.shape}, expected one label or value each: (n,)")
    check_pairs("references", found.size, expected.size)
    return found, expected


def _sklearn(function: str, *arrays: NDArray[Any], **options: Any) -> float:
    metrics = optional_module("sklearn.metrics", "F1 and Matthews' correlation", "scikit-learn", "train")
    with warnings.catch_warnings():  # that one class only occurs: its score is defined above
        warnings.simplefilter("ignore")
        return float(getattr(metrics, function)(*arrays, **options))


def _correlation(function: str, predictions: ArrayLike, references: ArrayLike) -> float:
    import scipy.stats

    found, expected = (a.astype(np.float64) for a in _pairs(predictions, references))
    if not all(np.isfinite(a).all() and np.ptp(a) > 0 for a in (found, expected)):
        return math.nan
    with warnings.catch_warnings():  # that the values are nearly constant
        warnings.simplefilter("ignore")
        return float(getattr(scipy.stats, function)(expected, found)[0])
