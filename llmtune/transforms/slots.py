"""Filling the optional slots that modules declare: what adds to the computation instead of to a weight.

    {"prompt": None, ...}   --prompt_tuning-->   {"prompt": Prompt(table), ...}

A slot is a leaf None at a known path. Filling it needs no new module, and while it is empty it costs nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax

from llmtune.errors import LlmtuneConfigError
from llmtune.transforms.transform import Params
from llmtune.weights import is_operator, path_name

VIRTUAL = ("prompt", "attention/prefix")  # slots of virtual tokens: a model has one kind of them


def slots(params: Params) -> dict[str, Any]:
    """`{path: what is there}` of all leaves, None in empty slots."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_whole)
    return {path_name(path): leaf for path, leaf in leaves}


def fill(params: Params, fillings: Mapping[str, Any]) -> Params:
    """The same tree with these slots filled, by path."""

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        return fillings.get(path_name(path), leaf)

    return jax.tree_util.tree_map_with_path(put, params, is_leaf=_whole)


def empty_slots(declared: Params, ending: str, method: str) -> list[str]:
    """The paths of the slots of this name, one for each stack of layers. One that is taken, or none at all, is an error."""
    found = {path: leaf for path, leaf in slots(declared).items() if path == ending or path.endswith(f"/{ending}")}
    if not found:
        raise LlmtuneConfigError(f"adapt.method: {method}: this model has no slot {ending!r} for it")
    for path, leaf in found.items():
        if leaf is not None:
            raise LlmtuneConfigError(f"adapt.method: {method}: the slot {path} is filled already; leave one method out")
    return list(found)


def refuse_other_virtual_tokens(declared: Params, method: str) -> None:
    """A prompt and a prefix would both begin the document: one excludes the other."""
    taken = [p for p, leaf in slots(declared).items() if leaf is not None and p.endswith(VIRTUAL)]
    if taken:
        raise LlmtuneConfigError(
            f"adapt.method: {method}: the model has virtual tokens already ({taken[0]}); a prompt and a prefix exclude each other"
        )


def _whole(leaf: Any) -> bool:
    return leaf is None or is_operator(leaf)
