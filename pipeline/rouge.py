"""ROUGE (Lin 2004) on words of any script."""

import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec

from pipeline.errors import ConfigError


def require_rouge(setting: str) -> None:
    """Raise ConfigError, which names the setting that asks for ROUGE, where its package is not."""
    if find_spec("rouge_score") is None:
        raise ConfigError(
            f"{setting} asks for ROUGE, which needs the package rouge-score: "
            "install rlhf-pipeline[eval], or leave the setting out"
        )


def f_measures(texts: Sequence[str], references: Sequence[str], variant: str) -> list[float]:
    """F-measure, 0 to 1, of each text: `variant` is rouge-score's rouge1, rouge2 or rougeL."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([variant], tokenizer=_Words())
    return [
        float(scorer.score(reference, text)[variant].fmeasure)
        for text, reference in zip(texts, references, strict=True)
    ]


class _Words:
    """rouge-score's tokenizer interface."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


# Scripts written without spaces, where each character counts as a word: Thai and Lao, Khmer,
# kana, and the Han ideographs.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


def words(text: str) -> list[str]:
    """Case-folded words of a text in any script, for ROUGE and repetition (punctuation separates).

    Runs of letters, digits and marks are words (Korean: what stands between spaces); scripts
    without spaces give single characters. ROUGE's own tokenizer keeps ASCII letters and digits
    only, so that two Korean texts would have no word at all.
    """
    found: list[str] = []
    open_word = False
    for char in unicodedata.normalize("NFC", text.casefold()):
        inside = unicodedata.category(char)[0] in "LNM"
        alone = inside and any(low <= ord(char) <= high for low, high in _UNSPACED)
        if inside and open_word and not alone:
            found[-1] += char
        elif inside:
            found.append(char)
        open_word = inside and not alone
    return found
