"""Decoding with a key-value cache: batched, ragged prompts, on one device or many."""
