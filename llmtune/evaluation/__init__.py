"""Measuring a model: held-out loss and perplexity."""
