"""config.json: both spellings mean the same, what is written loads elsewhere, what is not implemented is refused by name."""

import copy
import itertools
import json
import re
from dataclasses import asdict

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
FULL, SLIDING = "full_attention", "sliding_attention"
MINISTRAL = {
    "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 16, "layer_types": [FULL, SLIDING],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip
MINISTRAL3 = {
    "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "rope_scaling": ..., "rope_theta": ...,
    "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}, "max_position_embeddings": 262144,
    "pad_token_id": 11,
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "rope_scaling": None,
}  # fmt: skip


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
    scaling, queries = own.rope.scaling, own.rope.query_scaling
    rope = {"rope_theta": own.rope.theta, **({} if scaling is None else asdict(scaling))}
    rope |= {} if queries is None else {"llama_4_scaling_beta": queries.beta}
    return {
        **{name: value for name, value in vars(own).items() if name not in ("windows", "experts")},
        "rope": {name: value for name, value in rope.items() if value is not None},
        "windows": [own.window(n) for n in range(own.num_hidden_layers)],
        "experts": None if own.experts is None else tuple(vars(own.experts).values())[:3],
    }


DERIVED = ("architecture", "rope", "eos_token_ids", "windows", "experts", "attention_bias", "mlp_bias")
EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")


def theirs(config):
    """And in transformers."""
    kind = config["architectures"][0].removesuffix("ForCausalLM").lower()
    own = AutoConfig.for_model(**{"model_type": kind, **copy.deepcopy(config)})  # it changes its dicts
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    rope = {name: value for name, value in own.rope_parameters.items() if name not in ("type", "rope_type")}
    if own.rope_parameters["rope_type"] == "yarn":
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **rope}
    window = getattr(own, "sliding_window", None)
    types = getattr(own, "layer_types", None) or [SLIDING] * own.num_hidden_layers
    return {
        **{name: getattr(own, name) for name in vars(parse()) if name not in DERIVED},
        **{name: bool(getattr(own, name, False)) for name in ("attention_bias", "mlp_bias")},
        "head_dim": own.hidden_size // own.num_attention_heads if own.head_dim is None else own.head_dim,
        "architecture": own.architectures[0],
        "eos_token_ids": tuple(i for i in eos if i is not None),
        "rope": rope,
        "windows": [window if layer == SLIDING else None for layer in types],
        "experts": tuple(getattr(own, name) for name in EXPERTS) if kind == "mixtral" else None,
    }


FAMILIES = {
    name: {field: value for field, value in {**BASE, **own}.items() if value is not ...}
    for name, own in (("llama", {}), ("mistral", MISTRAL), ("ministral", MINISTRAL), ("ministral3", MINISTRAL3),
                      ("mixtral", MIXTRAL))
}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VALUES = [..., None, True, False, "8", 8, 6, 1.5, 1.0, 1e-5, -1, 0, [], {}, "silu", [2, 3], [FULL, FULL],
          {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, YARN]  # fmt: skip
ELSEWISE = [  # no eos or bos is assumed; -1 is how some files say none; a theta of null does not compute there
    ("bos_token_id", ...), ("eos_token_id", ...), ("bos_token_id", -1), ("pad_token_id", -1), ("rope_theta", None),
    ("pad_token_id", ...),
]  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_whatever_is_accepted_means_what_transformers_takes_it_for(family):
    """Every field with every kind of value: refused by name, or (where transformers does not refuse it) the same."""
    base, compared = FAMILIES[family], 0
    fields = [*base, "head_dim", "initializer_range", "pad_token_id", "sliding_window", "rope_parameters", "layer_types",
              "attention_bias", "mlp_bias"]  # fmt: skip
    for field, value in itertools.product(fields, VALUES):
        config = {name: own for name, own in {**base, field: value}.items() if own is not ...}
        if (field, value) in ELSEWISE:
            continue
        try:
            read = ours(config)
        except LlmtuneFormatError as error:
            others = ("num_attention_heads", "hidden_size", "rope_parameters", "num_hidden_layers", "num_local_experts")
            named = field in str(error) or field in others
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
    sparse |= {name: MINISTRAL3[name] for name in ("rope_parameters", "pad_token_id")} if family == "ministral3" else {}
    assert ours(sparse) == theirs(sparse)
    null = parse_model_config({**FAMILIES[family], "num_key_value_heads": None}, None, "config.json")
    assert null.num_key_value_heads == BASE["num_attention_heads"]


def test_the_two_spellings_of_rope_do_not_stand_side_by_side():
    """Transformers prefers one, others the other."""
    with pytest.raises(LlmtuneFormatError, match=r"rope_scaling is .* null beside rope_parameters"):
        parse(rope_parameters={"rope_type": "default", "rope_theta": 1e4})


WRITTEN = [
    {}, MISTRAL, {"rope_scaling": None, "tie_word_embeddings": True, "head_dim": 10}, MINISTRAL, MINISTRAL3, MIXTRAL,
    {**MISTRAL, "sliding_window": 77}, {"attention_bias": True}, {"mlp_bias": True}, {"attention_dropout": 0.25},
    {"rope_scaling": YARN, "rope_theta": ...},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {**MINISTRAL, "num_hidden_layers": 3, "layer_types": [FULL] * 3},
]  # fmt: skip


@pytest.mark.parametrize("more", WRITTEN)
def test_what_is_written_loads_in_transformers_and_here(tmp_path, more):
    config = parse(**{"pad_token_id": 5, "initializer_range": 0.01, **more})
    written = model_config_to_hf(config, "bfloat16")
    assert parse_model_config(written, None, "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert theirs({**loaded.to_dict(), "model_type": loaded.model_type}) == ours(written)
    assert loaded.dtype == torch.bfloat16 and loaded.hidden_act == "silu"


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
    "architectures": ["Qwen2ForCausalLM"], "attention_bias": "yes", "mlp_bias": 1, "hidden_act": "gelu",
    "quantization_config": {"bits": 4}, "partial_rotary_factor": 0.5, "auto_map": {"AutoModel": "evil.Model"},
    "num_local_experts": 8, "final_logit_softcapping": 30.0, "layer_types": ["full_attention"], "sliding_window": 4096,
    "vocab_size": "100",
    "hidden_size": 0, "num_hidden_layers": 2.0, "num_attention_heads": True, "num_key_value_heads": 4, "head_dim": 7,
    "rms_norm_eps": "1e-5", "rope_theta": 0, "tie_word_embeddings": "no", "model_type": "mistral",
    "eos_token_id": "</s>", "bos_token_id": 1.5, "max_position_embeddings": 0, "rope_scaling": [], "rope_parameters": "x",
    "attention_dropout": 1.0, "hidden_dropout": 0.1, "mup_enabled": True, "torch_dtype": "int4", "dtype": ["float32"],
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


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", 7, None, ["yarn"], {}])
def test_other_rope_scalings_are_refused_by_name(kind):
    with pytest.raises(
        LlmtuneFormatError,
        match=rf"rope_scaling\.rope_type is {re.escape(repr(kind))}; supported: default, linear, llama3 or",
    ):
        parse(rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("field", list(LLAMA3))
def test_llama3_scaling_guesses_nothing(field):
    with pytest.raises(LlmtuneFormatError, match=field):
        parse(rope_scaling={"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != field}})


OLD = {name: value for name, value in YARN.items() if name != "rope_theta"}  # which stands outside there
FAULTS = {  # what is wrong -> (family, changes, what the message says)
    "no factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is None"),
    "a shrinking factor": ("llama", {"rope_scaling": {**OLD, "factor": 0.5}}, r"rope_scaling\.factor is 0\.5"),
    "no original length": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
    "betas exchanged": ("llama", {"rope_scaling": {**OLD, "beta_fast": 1.0, "beta_slow": 2.0}}, "beta_fast.*at least"),
    "a field of another type": ("llama", {"rope_scaling": {**OLD, "low_freq_factor": 1.0}}, "low_freq_factor.*rope_type 'yarn'"),
    "query scaling elsewhere": ("mistral", {"rope_scaling": {**OLD, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    "no query scaling": ("ministral3", {"rope_parameters": YARN}, r"rope_parameters\.llama_4_scaling_beta is None"),
    "no yarn": ("ministral3", {"rope_parameters": {"rope_type": "default"}}, r"rope_parameters\.rope_type.*yarn"),
    "another original length outside": ("llama", {"original_max_position_embeddings": 77}, "position_embeddings is 77"),
    "two thetas": ("llama", {"rope_scaling": {**YARN, "rope_theta": 7.0}}, r"rope_scaling\.rope_theta is 7\.0.* 500000\.0"),
    "two types": ("llama", {"rope_scaling": {**YARN, "rope_theta": 5e5, "type": "linear"}}, "rope_type is 'yarn'.*'linear'"),
    "a window of nothing": ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    "windows that are ignored": ("mistral", {"sliding_window": 9, "layer_types": [FULL, SLIDING]}, "layer_types.*MinistralForC"),
    "too few layer types": ("ministral", {"layer_types": [FULL]}, "layer_types.*each of 2 layers"),
    "an unknown layer type": ("ministral", {"layer_types": [FULL, "chunked_attention"]}, "layer_types.*full_attention and"),
    "no window": ("ministral", {"sliding_window": None}, "sliding_window is None"),
    "biases that are ignored": ("mistral", {"attention_bias": True}, "attention_bias is True"),
    "more choices than experts": ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5.*num_local_experts 4"),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    "a negative coefficient": ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
    "experts elsewhere": ("mistral", {"num_local_experts": 8}, "num_local_experts is 8"),
    "another kind": ("mixtral", {"model_type": "mistral"}, "model_type is 'mistral'.*mixtral"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_does_not_fit_together_is_refused_by_name(fault):
    family, changes, message = FAULTS[fault]
    with pytest.raises(LlmtuneFormatError, match=message) as error:
        parse_model_config({**FAMILIES[family], **changes}, None, "config.json")
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


def test_windows_are_the_shortest_pattern_that_repeats():
    def windows(*types):
        config = {**FAMILIES["ministral"], "num_hidden_layers": len(types), "layer_types": list(types)}
        return parse_model_config(config, None, "config.json").windows

    assert windows(FULL, FULL) == (None,) and windows(SLIDING, SLIDING) == (16,)
    assert windows(FULL, SLIDING, FULL) == (None, 16) and windows(FULL, FULL, SLIDING) == (None, None, 16)
    implied = {name: value for name, value in FAMILIES["mistral"].items() if name != "sliding_window"}
    assert parse_model_config(implied, None, "config.json").windows == (4096,)


MULTIMODAL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "vision_config": {"model_type": "pixtral"},
    "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1, "spatial_merge_size": 2,
    "multimodal_projector_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_text_part_of_a_multimodal_model_is_read():
    inner = {name: value for name, value in FAMILIES["mistral"].items() if name not in ("architectures", "torch_dtype")}
    whole = parse_model_config({**MULTIMODAL, "text_config": inner}, None, "config.json")
    alone = parse_model_config(FAMILIES["mistral"], None, "config.json")
    assert {**vars(whole), "architecture": alone.architecture} == vars(alone) and whole.is_text_tower
    for changes, message in (
        ({"text_config": {**inner, "sliding_windows": 4}}, "unknown field 'sliding_windows'"),
        ({"text_config": {**inner, "model_type": "qwen2"}}, r"text_config\.model_type is 'qwen2'"),
        ({"text_config": None}, "text_config is None"),
        ({"text_config": inner, "logit_scale": 2}, "unknown field 'logit_scale'"),
        ({"text_config": inner, "tie_word_embeddings": True}, r"text_config\.tie_word_embeddings is False"),
    ):
        with pytest.raises(LlmtuneFormatError, match=message):
            parse_model_config({**MULTIMODAL, **changes}, None, "config.json")


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(LlmtuneFormatError, match=r"unknown field 'rope_thetas'.*did you mean 'rope_theta'"):
        parse(rope_thetas=1e6)
