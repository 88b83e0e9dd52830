"""Datasets: files or Hub ids -> checked, split records (`load_corpus`)."""

from pipeline.data.corpus import Corpus, Split, load_corpus

__all__ = ["Corpus", "Split", "load_corpus"]
