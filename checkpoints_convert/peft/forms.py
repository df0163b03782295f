"""What PEFT has no form for, and the names under which it is kept here: peft refuses them by name, llmtune reads them.

LLMTUNE_DORA, LLMTUNE_IA3, LLMTUNE_VERA    on experts, which transformers 5 holds in one fused parameter that peft adapts by
                                           LoRA alone: tensors and settings are those of the method, with a module for each
                                           expert, model.layers.3.block_sparse_moe.experts.0.w2
LLMTUNE_SEQUENTIAL, _PARALLEL, _FUSION     bottlenecks, in `bottleneck`
"""

from collections.abc import Iterable

OURS = "LLMTUNE_"
ON_EXPERTS = {"LLMTUNE_DORA": "LORA", "LLMTUNE_IA3": "IA3", "LLMTUNE_VERA": "VERA"}  # -> whose tensors they are
TITLES = {
    "LLMTUNE_DORA": "DoRA on experts",
    "LLMTUNE_IA3": "IA3 on experts",
    "LLMTUNE_VERA": "VeRA on experts",
    "LLMTUNE_SEQUENTIAL": "bottlenecks behind a projection",
    "LLMTUNE_PARALLEL": "bottlenecks beside the MLP",
    "LLMTUNE_FUSION": "AdapterFusion",
}


def form_of(method: str, adapted: Iterable[str], *, dora: bool) -> str:
    """The `peft_type` of a method that adapts these paths: its own name, where PEFT has a form for that."""
    if not any("/experts/" in path for path in adapted) or (method == "LORA" and not dora):
        return method
    return next((form for form, own in ON_EXPERTS.items() if own == method), method)


def said_of(form: str) -> str | None:
    """For a person: what peft lacks; None where it reads the directory."""
    if not form.startswith(OURS):
        return None
    return f"peft has no form for {TITLES[form]}: this directory ({form}) is llmtune's own, which it loads and goes on from"
