"""Flax modules that declare the architectures, and the record that binds one to its weights."""
