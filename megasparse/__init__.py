"""Pretraining of large language models whose ReLU feed-forward layers run as sparse as they are."""

__version__ = "0.1.0"
