"""Whether vLLM will load a PEFT directory, and what to change where it will not.

    {"peft_type": "LORA", "r": 20, "rank_pattern": {...}}  -->  [Finding(blocks=True, "rank_pattern ...", "--pad-rank 32")]

vLLM reads r, lora_alpha and target_modules, allocates for one of a few ranks, and applies alpha / r to every module: patterns are
ignored without a word, which scales wrongly. DoRA, modules_to_save and biases are refused.
"""

from dataclasses import dataclass
from typing import Any

from checkpoints_convert.peft.directory import PeftDirectory
from checkpoints_convert.peft.forms import ON_EXPERTS
from checkpoints_convert.peft.whole import whole_name

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
DEFAULT_RANK = 16
MERGE = "serve the merged model (export/model of a run, or llmtune.load(...).save) instead"
MERGEABLE = ("IA3", "VERA", *ON_EXPERTS)
OURS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "LLMTUNE_SEQUENTIAL", "LLMTUNE_PARALLEL", "LLMTUNE_FUSION")
ALONE = "it cannot be merged either: use it from llmtune, or train one of lora, dora, ia3 and vera"
UNKNOWN = "llmtune does not read it; merge it with what wrote it"


@dataclass(frozen=True)
class Finding:
    """`blocks`: vLLM will not load the adapter, or will compute something else with it; `mend`: what to do."""

    blocks: bool
    what: str
    mend: str


def findings(directory: PeftDirectory) -> list[Finding]:
    """What stands in the way, and what must be said to the server; nothing where it loads as it is."""
    settings = directory.settings
    method = settings.get("peft_type")
    if method != "LORA":
        mend = MERGE if method in MERGEABLE else ALONE if method in OURS else UNKNOWN
        return [Finding(True, f"peft_type is {method}; only LORA is served", mend)]
    found = [Finding(True, what, mend) for what, mend in _refused(directory)]
    ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]
    highest = max(ranks)
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        fitting = next((own for own in RANKS if own >= highest), None)
        mend = f"--pad-rank {fitting}" if fitting else f"--compress-rank {RANKS[-1]}"
        found.append(
            Finding(True, "rank_pattern or alpha_pattern is set and would be ignored, which scales wrongly", mend)
        )
    if highest > RANKS[-1]:
        found.append(Finding(True, f"rank {highest} is more than {RANKS[-1]}", f"--compress-rank {RANKS[-1]}"))
    elif highest > DEFAULT_RANK:
        needed = next(own for own in RANKS if own >= highest)
        mend = f"start the server with --max-lora-rank {needed}, or --compress-rank {DEFAULT_RANK}"
        found.append(Finding(False, f"rank {highest} is more than the server's default of {DEFAULT_RANK}", mend))
    return found


def _refused(directory: PeftDirectory) -> list[tuple[str, str]]:
    settings: dict[str, Any] = dict(directory.settings)
    whole = sorted({name for key in directory.weights.tensors if (name := whole_name(key)) is not None})
    fields = (
        ("use_dora", "use_dora is true; DoRA is not served"),
        ("modules_to_save", f"modules_to_save is {settings.get('modules_to_save')}; whole weights are not served"),
        ("lora_bias", "lora_bias is true; biases are not served"),
        ("trainable_token_indices", "trainable_token_indices is set; trained tokens are not served"),
        ("layer_replication", "layer_replication is set; repeated layers are not served"),
    )
    found = [(what, MERGE) for name, what in fields if settings.get(name)]
    if whole and not settings.get("modules_to_save"):
        found.append((f"it brings {whole[0]} in whole; whole weights are not served", MERGE))
    if settings.get("bias") not in (None, "none"):
        found.append((f"bias is {settings['bias']}; biases are not served", MERGE))
    if not settings.get("target_modules"):
        found.append(("target_modules is not a list of modules", "write it out in adapter_config.json"))
    if settings.get("target_parameters"):
        found.append(("target_parameters is set; experts in one fused parameter are not served", MERGE))
    return found
