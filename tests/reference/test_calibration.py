"""Held-out agreement and calibration against numbers computed by hand."""

import math

import numpy as np
import pytest

from stages.reward.calibration import (
    ScoredPairs,
    accuracy,
    accuracy_by,
    calibration_report,
    confidence,
    expected_calibration_error,
    longer_preferred,
    reliability_bins,
    scored_pairs,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_pairs_of_a_ranking() -> None:
    # Ranking 1 > (0 = 2): pairs 1-0 and 1-2 only.
    pairs = scored_pairs([[0.5, 2.0, 3.0]], [[1, 0, 1]], [[10, 4, 4]], ["ann"])
    assert pairs.difference.tolist() == [1.5, -1.0]
    assert pairs.rank_distance.tolist() == [1, 1]
    assert pairs.length_difference.tolist() == [-6, 0]
    assert pairs.annotator.tolist() == ["ann", "ann"]


def test_accuracy_counts_undecided_pairs_half() -> None:
    assert accuracy(np.array([1.0, -0.1, 0.0, 2.0])) == 2.5 / 4


def test_accuracy_by_rank_distance_and_annotator() -> None:
    # Scores 3, 1, 2 for ranks 0, 1, 2: pairs 0-1 right (distance 1), 0-2 right (2), 1-2 wrong (1).
    # Another annotator has one pair at distance 1, wrong.
    pairs = scored_pairs(
        [[3.0, 1.0, 2.0], [0.0, 5.0]], [[0, 1, 2], [0, 1]], [[1, 1, 1], [1, 1]], ["a", "b"]
    )
    assert accuracy_by(pairs.difference, pairs.rank_distance) == {
        "1": {"accuracy": pytest.approx(1 / 3), "pairs": 3},
        "2": {"accuracy": 1.0, "pairs": 1},
    }
    assert accuracy_by(pairs.difference, pairs.annotator) == {
        "a": {"accuracy": pytest.approx(2 / 3), "pairs": 3},
        "b": {"accuracy": 0.0, "pairs": 1},
    }


def test_confidence_is_the_sigmoid_of_the_distance() -> None:
    assert confidence(np.array([0.0, logit(0.8), -logit(0.8)])).tolist() == pytest.approx(
        [0.5, 0.8, 0.8]
    )


def test_reliability_bins_and_ece_by_hand() -> None:
    # Two pairs at confidence 0.62 (one right), four at 0.93 (three right), in slices of 0.05.
    # ECE = 2/6 |0.5 - 0.62| + 4/6 |0.75 - 0.93| = 0.04 + 0.12 = 0.16.
    low, high = logit(0.62), logit(0.93)
    difference = np.array([low, -low, high, high, high, -high])
    rows = reliability_bins(difference)
    assert [row["pairs"] for row in rows] == [2, 4]
    assert [row["low"] for row in rows] == pytest.approx([0.6, 0.9])
    assert [row["high"] for row in rows] == pytest.approx([0.65, 0.95])
    assert [row["confidence"] for row in rows] == pytest.approx([0.62, 0.93])
    assert [row["accuracy"] for row in rows] == pytest.approx([0.5, 0.75])
    assert expected_calibration_error(difference) == pytest.approx(0.16)


def test_full_confidence_lies_in_the_last_slice() -> None:
    rows = reliability_bins(np.array([1e3, -1e3]))
    assert rows == [{"low": 0.95, "high": 1.0, "confidence": 1.0, "accuracy": 0.5, "pairs": 2}]


def test_labels_drawn_from_the_model_are_calibrated() -> None:
    # Preferences drawn with probability sigmoid(d): over 200,000 pairs the error of a bin's
    # accuracy is about sqrt(0.25 / 20,000) = 0.0035, so ECE stays below 0.01.
    rng = np.random.default_rng(0)
    d = rng.normal(0, 2, 200_000)
    agreed = rng.random(d.size) < 1 / (1 + np.exp(-d))
    difference = np.where(agreed, d, -d)
    assert expected_calibration_error(difference) < 0.01
    # Twice the logits are overconfident, and must be seen to be.
    assert expected_calibration_error(2 * difference) > 0.05


def test_longer_preferred_by_data_and_by_model() -> None:
    pairs = ScoredPairs(
        # lengths: preferred longer, shorter, longer, equal; model right, right, wrong, right
        difference=np.array([1.0, 1.0, -1.0, 1.0]),
        rank_distance=np.array([1, 1, 1, 1]),
        length_difference=np.array([5, -3, 2, 0]),
        annotator=np.array(["", "", "", ""], dtype=object),
    )
    # Data: longer preferred in pairs 1 and 3 of the 3 unequal ones. Model: longer only in pair 1.
    assert longer_preferred(pairs) == {
        "data": pytest.approx(2 / 3),
        "model": pytest.approx(1 / 3),
        "pairs": 3,
    }


def test_report_leaves_out_unnamed_annotators() -> None:
    pairs = scored_pairs([[1.0, 0.0], [1.0, 0.0]], [[0, 1]] * 2, [[1, 2]] * 2, [None, "ann"])
    report = calibration_report(pairs)
    assert report["pairs"] == 2
    assert report["accuracy"] == 1.0
    assert report["accuracy_by_annotator"] == {"ann": {"accuracy": 1.0, "pairs": 1}}


def test_no_pairs_is_not_a_number() -> None:
    report = calibration_report(scored_pairs([], [], [], []))
    assert math.isnan(report["accuracy"]) and math.isnan(report["ece"])
    assert report["reliability"] == []
