"""The model card: README.md beside exported weights, as Hugging Face's hub reads it.

Everything in it is known of this run; what is not known is said to be unknown. Text from outside is put where Markdown leaves
it alone.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmtune.evaluation.perplexity import perplexity
from llmtune.provenance.licenses import UNKNOWN, Found

HERE, BESIDE = '"path/to/this/directory"', '"path/to/this/directory/../base"'
LIBRARY = {"model": "transformers", "adapter": "peft", "own adapter": "llmtune"}  # by kind of card


@dataclass(frozen=True)
class Facts:
    """What a card tells: the resolved configuration, run.json, evaluation.json, and the licence that was found."""

    config: Mapping[str, Any]
    run: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    found: Found


def model_card(facts: Facts, kind: str, has_agreement: bool, *, base_beside: bool = False) -> str:
    """The page of an exported `model`, `adapter` or `own adapter`, which peft does not read.

    `has_agreement`: whether the licence's text lies beside it; `base_beside`: whether the adapter has a base of its own there.
    """
    parts = [
        _front(facts, kind),
        f"# {_plain(facts.found.name)}",
        _shown(facts),
        _summary(facts, kind),
        "## Use\n\n" + _use(facts, kind, base_beside),
        "## Data\n\n" + _data(facts),
        "## Training\n\n" + _training(facts),
        "## Evaluation\n\n" + _evaluation(facts),
        "## Limits\n\nMeasured is what stands above, on the validation data named above, and nothing else: no safety or bias "
        "evaluation was made. What is known of the base model's limits holds for this one.",
        "## Licence\n\n" + _license(facts, has_agreement),
        "`provenance.json` beside this page holds hashes of the base and of all data, the whole configuration and the versions.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(facts: Facts, kind: str) -> str:
    found, base = facts.found.license, str(facts.config["model"])
    front: dict[str, Any] = {"license": found.key if found.listed else "other"}
    if found.key in ("mrl", "mnpl"):
        front["license_name"] = found.key
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        front["base_model"] = base
    front |= {"library_name": LIBRARY[kind], "pipeline_tag": "text-generation", "tags": ["llmtune", _objective(facts)]}
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def _shown(facts: Facts) -> str:
    return "" if facts.found.license.shown is None else f"**{facts.found.license.shown}**"


def _summary(facts: Facts, kind: str) -> str:
    model = facts.run.get("model", {})
    what = "A model trained from" if kind == "model" else "An adapter for"
    trained, total = model.get("trainable_parameters", 0), model.get("parameters", 0)
    share = "all" if trained == total else f"{trained:,} of {total:,}"
    architecture = _plain(model.get("architecture", "a decoder"))
    return (
        f"{what} `{_code(facts.config['model'])}` ({architecture}) by llmtune, objective `{_objective(facts)}`, "
        f"{_method(facts)}; {share} parameters trained."
    )


def _use(facts: Facts, kind: str, base_beside: bool) -> str:
    base = BESIDE if base_beside else json.dumps(_code(facts.config["model"]))
    if kind == "own adapter":
        return "\n".join(["```python", "import llmtune", "", f"model = llmtune.load({base}, adapters=[{HERE}])", "```"])
    lines = [
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({HERE})",
    ]
    if kind == "adapter":
        lines[1:] = [
            "from peft import PeftModel", "", f"base = AutoModelForCausalLM.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(base, {HERE})",
        ]  # fmt: skip
    return "\n".join(["```python", *lines, "```"])


def _data(facts: Facts) -> str:
    rows = ["| part | source | weight | rows | tokens | licence | sha256 |", "|---|---|---|---|---|---|---|"]
    for part in ("train", "validation"):
        for source in facts.run.get("data", {}).get(part, {}).get("sources", []):
            counts = source.get("counts", {})
            cells = (
                part, f"`{_code(source.get('name', ''))}`", f"{source.get('weight', 1):g}", _number(counts.get("rows")),
                _number(counts.get("tokens")), _plain(source.get("license") or "not stated"),
                f"`{str(source.get('sha256', ''))[:16]}`",
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _training(facts: Facts) -> str:
    config, rows = facts.config, []
    for section, keys in {
        "train": ("batch_size", "microbatches", "dtype", "seed"),
        "optimizer": ("name", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm"),
        "data": ("sequence_length", "packing"),
    }.items():
        own = config.get(section) or {}
        rows += [f"| `{section}.{key}` | `{_code(own[key])}` |" for key in keys if key in own]
    head = [f"{facts.run.get('steps', 0):,} steps.", "", "| key | value |", "|---|---|"]
    return "\n".join([*head, *rows])


def _evaluation(facts: Facts) -> str:
    before, after = (facts.evaluation.get(moment, {}) for moment in ("before", "after"))
    if "loss" not in after:
        return "No validation data was given: nothing is known of what the model does on text that it has not seen."
    rows = ["| | loss, nats per token | perplexity | tokens |", "|---|---|---|---|"]
    for name, own in (("base", before), ("this model", after)):
        if "loss" in own:
            rows.append(f"| {name} | {own['loss']:.4f} | {perplexity(own['loss']):.4g} | {own.get('tokens', 0):,} |")
    return "\n".join(["On the validation data:", "", *rows])


def _license(facts: Facts, has_agreement: bool) -> str:
    own, lines = facts.found.license, []
    if own.key == UNKNOWN:
        why = _plain(facts.found.how)
        return f"The licence of the base model is unknown ({why}). Whoever passes this on must find out first."
    lines.append(f"The base model is under the {own.title} (known {_plain(facts.found.how)}); so is this derivative.")
    if own.limits is not None:
        lines.append(f"**{own.limits[0].upper()}{own.limits[1:]}.**")
    if own.notice is not None:
        lines.append(f"{own.notice} (also in `NOTICE`)")
        lines.append("Uses by services of more than 700 million monthly users need a licence from Meta (section 2).")
    if not has_agreement:
        lines.append(
            "The text of the licence did not lie beside the base's weights: **add a copy before passing this on.**"
        )
    return "\n\n".join(lines)


def _objective(facts: Facts) -> str:
    return str(facts.config.get("objective", "sft"))


def _method(facts: Facts) -> str:
    adapt = facts.config.get("adapt") or []
    named = [f"{own.get('method', 'lora')}" for own in (adapt if isinstance(adapt, list) else [adapt])]
    return " and ".join(dict.fromkeys(named)) or "full fine-tuning"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _plain(text: Any) -> str:
    """One line in which nothing is Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    """One line between backquotes, in a table too."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
