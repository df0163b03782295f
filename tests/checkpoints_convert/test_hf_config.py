"""config.json: both spellings mean the same, what is written loads elsewhere, what is not implemented is refused by name."""

import copy
import itertools
import json

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from checkpoints_convert.hf_config import model_config_to_hf, parse_model_config, read_model_config
from llmtune.errors import LlmtuneFormatError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    "tie_word_embeddings": False, "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def parse(**changes):
    config = {**BASE, **changes}
    return parse_model_config({k: v for k, v in config.items() if v is not ...}, None, "config.json")


def test_both_spellings_mean_the_same():
    new = parse(
        rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16",
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    )  # fmt: skip
    assert new == parse() == parse(rope_scaling={"type": "llama3", **LLAMA3})
    assert new.rope.theta == 500000.0 and new.rope.scaling.factor == 8.0


def ours(config):
    """What the mathematics takes from it here, under transformers' names."""
    own = parse_model_config(json.loads(json.dumps(config)), None, "config.json")
    scaling = own.rope.scaling
    rope = {"rope_type": "llama3", **vars(scaling)} if scaling else {"rope_type": "default"}
    return {**vars(own), "eos_token_ids": own.eos_token_ids, "rope": {**rope, "rope_theta": own.rope.theta}}


def theirs(config):
    """And in transformers."""
    kind = config["architectures"][0].removesuffix("ForCausalLM").lower()
    own = AutoConfig.for_model(**{"model_type": kind, **copy.deepcopy(config)})  # it changes its dicts
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    rope = {name: value for name, value in own.rope_parameters.items() if name != "type"}
    values = {
        name: getattr(own, name) for name in vars(parse()) if name not in ("architecture", "rope", "eos_token_ids")
    }
    return {
        **values,
        "architecture": own.architectures[0],
        "eos_token_ids": tuple(i for i in eos if i is not None),
        "rope": rope,
    }


FAMILIES = {"llama": BASE, "mistral": {**BASE, **MISTRAL}}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VALUES = [..., None, True, False, "8", 8, 6, 1.5, 1.0, 1e-5, -1, 0, [], {}, "silu", [2, 3], {"rope_type": "default"}]
ELSEWISE = [  # no eos or bos is assumed; -1 is how some files say none; a theta of null does not compute there
    ("bos_token_id", ...), ("eos_token_id", ...), ("bos_token_id", -1), ("pad_token_id", -1), ("rope_theta", None),
]  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_whatever_is_accepted_means_what_transformers_takes_it_for(family):
    """Every field with every kind of value: refused by name, or (where transformers does not refuse it) the same."""
    base, compared = FAMILIES[family], 0
    fields = [*base, "head_dim", "initializer_range", "pad_token_id", "sliding_window", "rope_parameters"]
    for field, value in itertools.product(fields, VALUES):
        config = {name: own for name, own in {**base, field: value}.items() if own is not ...}
        if (field, value) in ELSEWISE:
            continue
        try:
            read = ours(config)
        except LlmtuneFormatError as error:
            named = field in str(error) or field in ("num_attention_heads", "hidden_size", "rope_parameters")
            assert named and str(error).isprintable(), (field, value)
            continue
        try:
            expected = theirs(config)
        except Exception:  # its own strictness about types
            continue
        assert read == expected, (field, value)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_absent_is_what_transformers_assumes(family):
    sizes = {name: 8 * BASE[name] for name in SIZES}  # Mistral's eight key-value heads divide its heads
    sparse = {"architectures": FAMILIES[family]["architectures"], **sizes, "bos_token_id": 1, "eos_token_id": 2}
    sparse |= {"sliding_window": None} if family == "mistral" else {}
    assert ours(sparse) == theirs(sparse)
    assert parse(**{**FAMILIES[family], "num_key_value_heads": None}).num_key_value_heads == BASE["num_attention_heads"]


def test_the_two_spellings_of_rope_do_not_stand_side_by_side():
    """Transformers prefers one, others the other."""
    with pytest.raises(LlmtuneFormatError, match=r"rope_scaling is .* null beside rope_parameters"):
        parse(rope_parameters={"rope_type": "default", "rope_theta": 1e4})


@pytest.mark.parametrize("more", [{}, MISTRAL, {"rope_scaling": None, "tie_word_embeddings": True, "head_dim": 10}])
def test_what_is_written_loads_in_transformers_and_here(tmp_path, more):
    config = parse(**more, pad_token_id=5, initializer_range=0.01)
    written = model_config_to_hf(config, "bfloat16")
    assert parse_model_config(written, None, "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert theirs({**loaded.to_dict(), "model_type": loaded.model_type}) == ours(written)
    assert loaded.dtype == torch.bfloat16 and loaded.hidden_act == "silu"
    assert getattr(loaded, "sliding_window", None) is None


def test_generation_config_has_the_last_word_on_eos(tmp_path):
    assert parse().eos_token_ids == (2, 3)
    assert parse_model_config(BASE, {"eos_token_id": 7}, "config.json").eos_token_ids == (7,)
    assert parse_model_config(BASE, {"temperature": 1.0}, "config.json").eos_token_ids == (2, 3)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    for eos in (7, [7, 8]):
        GenerationConfig(eos_token_id=eos).save_pretrained(tmp_path)
        there = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        assert list(read_model_config(tmp_path).eos_token_ids) == (there if isinstance(there, list) else [there])
    with pytest.raises(LlmtuneFormatError, match=r"generation_config.json: eos_token_id is 'stop'"):
        parse_model_config(BASE, {"eos_token_id": "stop"}, "config.json")


REFUSED = {
    "architectures": ["Qwen2ForCausalLM"], "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
    "quantization_config": {"bits": 4}, "partial_rotary_factor": 0.5, "auto_map": {"AutoModel": "evil.Model"},
    "num_local_experts": 8, "final_logit_softcapping": 30.0, "layer_types": ["full_attention"], "vocab_size": "100",
    "hidden_size": 0, "num_hidden_layers": 2.0, "num_attention_heads": True, "num_key_value_heads": 4, "head_dim": 7,
    "rms_norm_eps": "1e-5", "rope_theta": 0, "tie_word_embeddings": "no", "model_type": "mistral",
    "eos_token_id": "</s>", "bos_token_id": 1.5, "max_position_embeddings": 0, "rope_scaling": [], "rope_parameters": "x",
    "architectures ": 1, "x" * 1000: 1, "a\nline": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", list(REFUSED), ids=lambda field: ascii(field[:30]))
def test_what_is_not_implemented_is_refused_by_name(field):
    with pytest.raises(LlmtuneFormatError) as error:
        parse(**{field: REFUSED[field]})
    said = str(error.value)
    assert (
        ascii(field[:50])[1:-1] in said and said.startswith("config.json: ") and said.isprintable() and len(said) < 400
    )


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "linear"])
def test_other_rope_scalings_are_refused_by_name(kind):
    with pytest.raises(LlmtuneFormatError, match=rf"rope_scaling\.rope_type is '{kind}'"):
        parse(rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("field", list(LLAMA3))
def test_llama3_scaling_guesses_nothing(field):
    with pytest.raises(LlmtuneFormatError, match=field):
        parse(rope_scaling={"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != field}})


@pytest.mark.parametrize("window", [4096, ...])
def test_a_sliding_window_is_refused_even_where_it_is_only_implied(window):
    with pytest.raises(LlmtuneFormatError, match=r"sliding_window.*4096"):
        parse(**{**MISTRAL, "sliding_window": window})
    assert parse(**MISTRAL).architecture == "MistralForCausalLM"


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(LlmtuneFormatError, match=r"unknown field 'rope_thetas'.*did you mean 'rope_theta'"):
        parse(rope_thetas=1e6)
