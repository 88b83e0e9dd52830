"""ROUGE and its words, whatever the script."""

import pytest

from pipeline.rouge import f_measures, words


def test_words_of_any_script() -> None:
    assert words("The Cat's 2nd nap.") == ["the", "cat", "s", "2nd", "nap"]
    assert words("고양이가 잤다.") == ["고양이가", "잤다"]
    assert words("猫が3回") == ["猫", "が", "3", "回"]
    # Decomposed and precomposed Hangul are the same word.
    assert words("\u1100\u1161") == words("\uac00") == ["\uac00"]
    assert words(" ...!") == []


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # Of the text's words (a b c d) the reference (a c e) has a and c, in order; no pair of words.
    # Precision 2/4, recall 2/3: F = 2 x 1/3 / (7/6) = 4/7.
    text, reference = ["A, b. c d"], ["a c e!"]
    assert f_measures(text, reference, "rougeL") == [pytest.approx(4 / 7)]
    assert f_measures(text, reference, "rouge1") == [pytest.approx(4 / 7)]
    assert f_measures(text, reference, "rouge2") == [0]
