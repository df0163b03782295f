"""Checkpoints of a run: what a step's directory holds, when it counts, and which step a run goes on from.

    checkpoints/200/MANIFEST.json   what the step is, a digest of each array and of each file
    checkpoints/200/...             the arrays, as Orbax writes them
    checkpoints/300.partial         a save under way, or what a killed one left
    checkpoints/100.corrupt         a step that was found damaged, and is kept for whoever wants to know why

checkpoints.py composes the rest: arrays.py (Orbax), digest.py, manifest.py, steps.py (directories), commit.py, retention.py.
A step counts from the moment that its directory has its name, and it gets its name last.
"""
