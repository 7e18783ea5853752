"""Classification and regression metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from loftq.errors import ConfigError
from loftq.evaluate import metrics
from loftq.evaluate.metrics import METRICS, score_labels

pytest.importorskip("sklearn", reason="needs scikit-learn")

# TP = 6, FN = 1, FP = 2, TN = 3
REFERENCES = [1] * 7 + [0] * 5
PREDICTIONS = [1] * 6 + [0] + [1] * 2 + [0] * 3

# Three classes: one of two 0s found and one 1 and one 2 taken for another.
MANY_REFERENCES = [0, 0, 1, 1, 2, 2]
MANY_PREDICTIONS = [0, 1, 1, 1, 2, 0]


def test_two_classes():
    found = score_labels(["accuracy", "f1", "matthews"], PREDICTIONS, REFERENCES)
    assert found == {
        "accuracy": pytest.approx(75),  # 9 of 12
        "accuracy_se": pytest.approx(12.5),  # sqrt(0.75 * 0.25 / 12) = 1 / 8
        "f1": pytest.approx(80),  # 2 * 6 / (2 * 6 + 2 + 1)
        "matthews": pytest.approx(100 * (6 * 3 - 2 * 1) / math.sqrt(8 * 7 * 5 * 4)),
    }


def test_three_classes():
    # F1: 0 has TP 1, FP 1, FN 1: 1/2; 1 has TP 2, FP 1: 4/5; 2 has TP 1, FN 1: 2/3
    assert metrics.f1_macro(MANY_PREDICTIONS, MANY_REFERENCES) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    # Gorodkin: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), c = 4 right of s = 6, p = 2, 3, 1, t = 2, 2, 2
    expected = (4 * 6 - 12) / math.sqrt((36 - 14) * (36 - 12))
    assert metrics.matthews(MANY_PREDICTIONS, MANY_REFERENCES) == pytest.approx(expected)
    assert metrics.accuracy(MANY_PREDICTIONS, MANY_REFERENCES) == pytest.approx(4 / 6)


def test_correlations():
    # deviations -1.5, -.5, .5, 1.5 and -1.5, .5, -.5, 1.5: 4 / sqrt(5 * 5)
    assert score_labels(["pearson", "spearman"], [1, 3, 2, 4], [1, 2, 3, 4]) == {
        "pearson": pytest.approx(80),
        "spearman": pytest.approx(80),
    }
    # the ranks are those above, whatever the values
    assert metrics.spearman([10, 30, 20, 1000], [1, 2, 3, 4]) == pytest.approx(0.8)
    # ties have the ranks 1.5, 1.5, 3.5, 3.5: deviations -1, -1, 1, 1, so 4 / sqrt(4 * 5)
    assert metrics.spearman([7, 7, 9, 9], [1, 2, 3, 4]) == pytest.approx(4 / math.sqrt(20))


def test_texts_as_labels():
    assert metrics.accuracy(["yes", "no"], ["yes", "yes"]) == 0.5
    assert metrics.f1_macro(["yes", "no"], ["yes", "no"]) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([1, 1, 1], [0, 1, 1]),
        ([0, 1, 1], [1, 1, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([1], [1]),
        ([2.0, math.nan, 1.0], [1.0, 2.0, 3.0]),
        ([2.0, math.inf, 1.0], [1.0, 2.0, 3.0]),
    ],
)
def test_undefined_values(predictions, references):
    """A constant side, a single pair, or what is not finite: no correlation, Matthews 0, and not a word on stderr."""
    found = score_labels(["pearson", "spearman"], predictions, references)
    assert found == {"pearson": None, "spearman": None}
    assert math.isnan(metrics.pearson(predictions, references))
    if isinstance(predictions[0], int):
        assert metrics.matthews(predictions, references) == 0


@pytest.mark.filterwarnings("error")
def test_no_true_positive():
    assert score_labels(["f1"], [0, 0, 0], [1, 0, 1]) == {"f1": 0}
    assert score_labels(["f1"], [0, 0], [0, 0]) == {"f1": 0}


@pytest.mark.filterwarnings("error")
def test_nearly_constant_values():
    """Their correlation is numerically delicate, which scipy would say on stderr."""
    values = 1 + 1e-13 * np.arange(4)
    assert abs(metrics.pearson(values, [1, 2, 3, 4])) <= 1 + 1e-9


def test_mean_error():
    assert metrics.mean_error([1, 2, 3, 4]) == pytest.approx(math.sqrt(5 / 3) / 2)  # variance 5 / 3, n = 4
    assert metrics.mean_error([3.0]) == 0


def test_registry():
    assert set(METRICS) == {"accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman"}
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.expects == ("values" if name in ("pearson", "spearman") else "labels")
        assert metric.larger_is_better
        assert metric.function([0, 1, 1], [0, 1, 1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("names", "predictions", "references", "message"),
    [
        (["acuracy"], [1], [1], "did you mean accuracy"),
        (["accuracy"], [1, 2], [1], "2 predictions and 1 references"),
        (["pearson"], [], [], "at least one"),
        (["accuracy"], [[1, 2]], [1], r"shape \(1, 2\)"),
        (["f1"], [0, 1, 2], [0, 1, 2], "use f1_macro"),
    ],
)
def test_mistakes(names, predictions, references, message):
    with pytest.raises(ConfigError, match=message):
        score_labels(names, predictions, references)


def test_without_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ConfigError, match=r'scikit-learn, which is not installed; pip install "loftq\[train\]"'):
        metrics.matthews([0, 1], [0, 1])
    assert metrics.accuracy([0, 1], [0, 1]) == 1
