"""What a run survives, measured: each row of docs/reliability.md is a function here, in two sizes.

`pytest tests/reliability` runs the small size; `make reliability` runs the full one and writes the table.

Runs are real: `llmtune train` in processes of its own, forked from one that has imported everything (forge.py), and broken on
purpose at the places that faults.py names.
"""
