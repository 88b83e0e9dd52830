"""Datasets: files or Hub ids -> checked, split records (`load_corpus`)."""

from pipeline.data.corpus import KINDS, Corpus, Split, load_corpus

__all__ = ["KINDS", "Corpus", "Split", "load_corpus"]
