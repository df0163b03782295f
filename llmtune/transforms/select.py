"""Path rules: which weights a transform is about.

A weight's path is its place in the parameter tree, `layers/0/attention/q/kernel`. A rule is one of

    layers                every matrix of the layers but routers, those of experts too
    all-linear            every matrix of the layers (the embedding, the head and experts excluded, as in peft)
    attention, mlp        those of one part of a block
    experts               those of all experts
    lm_head, embed_tokens the head and the embedding, where they are not tied
    q_proj, up_proj, ...  the names that peft users know
    any other text        a regular expression that matches somewhere in the path
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax

from llmtune.errors import LlmtuneConfigError
from llmtune.weights import is_operator, path_name

EMBEDDING, HEAD = "embed/table", "head/kernel"
NAMED_RULES = {
    "layers": r"^layers/.*/(attention/.*|mlp/(gate|up|down)/|mlp/experts/.*)kernel$",
    "all-linear": r"^layers/.*/(attention/.*|mlp/(gate|up|down)/)kernel$",
    "attention": r"^layers/.*/attention/.*kernel$",
    "mlp": r"^layers/.*/mlp/(gate|up|down)/kernel$",
    "experts": r"^layers/.*/mlp/experts/(gate|up|down)/kernel$",
    "lm_head": r"^head/kernel$",
    "embed_tokens": r"^embed/table$",
    **{f"{name}_proj": rf"/attention/{name}/kernel$" for name in "qkvo"},
    **{f"{name}_proj": rf"/mlp/{name}/kernel$" for name in ("gate", "up", "down")},
}


def weights_by_path(params: Any) -> dict[str, Any]:
    """`{path: weight}` with operators whole; empty slots are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_operator)
    return {path_name(path): leaf for path, leaf in leaves}


def select(
    params: Any, rules: str | Sequence[str], *, key: str = "adapt.targets", both_ends: bool = False
) -> list[str]:
    """The paths of the matrices that any rule matches, in tree order. A rule that matches none is an error that names `key`.

    The table of a tied model is its head too: it is chosen, by either name, only where `both_ends` are meant.
    """
    weights = weights_by_path(params)
    matrices = [path for path in weights if path.endswith("kernel") or path == EMBEDDING]
    chosen: set[str] = set()
    for rule in [rules] if isinstance(rules, str) else rules:
        tied = HEAD not in weights
        pattern = _pattern("embed_tokens" if tied and both_ends and rule == "lm_head" else rule, key)
        found = [path for path in matrices if pattern.search(path)]
        if tied and not both_ends and (rule == "lm_head" or EMBEDDING in found):
            raise LlmtuneConfigError(
                f"{key}: {rule}: this model's head is tied to its embedding, and an adapter would part them; leave it out, "
                "set untie: true, or ensure_weight_tying: true for one that both share"
            )
        if not found:
            known = [*NAMED_RULES, *matrices]
            nearest = ", ".join(difflib.get_close_matches(rule, known, n=3, cutoff=0.3) or list(NAMED_RULES)[:3])
            raise LlmtuneConfigError(f"{key}: {rule!r} matches no weight; nearest: {nearest}")
        chosen.update(found)
    return [path for path in matrices if path in chosen]


def _pattern(rule: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(NAMED_RULES.get(rule, rule))
    except re.error as error:
        raise LlmtuneConfigError(f"{key}: {rule!r} is not a regular expression ({error})") from None
