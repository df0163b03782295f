"""Meta's and Mistral's layouts, written here with torch as their publishers do, against transformers on what comes out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_convert.convert import Plan, convert
from checkpoints_convert.layouts import Hints, open_layout
from checkpoints_convert.original_params import inner_factors, inner_size
from checkpoints_convert.safetensors_reader import read_json
from llmtune.errors import LlmtuneError
from tests.parity.reference import make_model, save_model

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MISTRAL = {"head_dim": 16, "sliding_window": None}
TOKENS = torch.tensor(np.random.default_rng(0).integers(3, 199, (1, 600)))
PARALLEL = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0, "tok_embeddings": 0}


def original_state(model) -> dict[str, torch.Tensor]:
    """A transformers model's tensors as Meta and Mistral name and order them: pairs of rows instead of halves."""
    config = model.config
    inner = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    names |= {f"layers.{n}.{ours}": f"model.layers.{n}.{theirs}" for n in range(config.num_hidden_layers)
              for ours, theirs in inner.items()}  # fmt: skip
    state, result = model.state_dict(), {}
    for ours, theirs in names.items():
        tensor = state[f"{theirs}.weight"].detach()
        if ours.endswith((".wq", ".wk")):
            heads = config.num_attention_heads if ours.endswith("wq") else config.num_key_value_heads
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        result[f"{ours}.weight"] = tensor.clone()
    return result


def params_of(config, **more):
    return {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"], **more,
    }  # fmt: skip


def save_meta(directory, *, files=1, embedding_axis=0, dtype=torch.float32, extra=None, params=None, **more):
    """A model of transformers and a directory as Meta would have published it."""
    model = in_dtype(make_model(more.pop("name", "gqa untied"), **SIZES, **more), dtype)
    state = {**original_state(model), **(extra or {})}
    directory.mkdir()
    axes = {**PARALLEL, "tok_embeddings": embedding_axis}
    for rank in range(files):
        part = {}
        for name, tensor in state.items():
            axis = axes.get(name.removesuffix(".weight").rsplit(".", 1)[-1])
            part[name] = tensor if axis is None else tensor.chunk(files, axis)[rank].clone()
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    own = params_of(model.config, **{"multiple_of": 32, "ffn_dim_multiplier": 0.5, **(params or {})})
    (directory / "params.json").write_text(json.dumps(own))
    (directory / "tokenizer.model").write_text("ranks")
    return model


def in_dtype(model, dtype):
    """Its weights alone: `model.to` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model):
    with torch.no_grad():
        return model.float()(TOKENS).logits


@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_meta_becomes_the_model_that_it_is(files, dtype, tmp_path):
    model = save_meta(tmp_path / "meta", files=files, dtype=dtype)
    convert(tmp_path / "meta", tmp_path / "hf", Plan())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert again.dtype == dtype and (tmp_path / "hf" / "tokenizer.model").read_text() == "ranks"
    assert torch.equal(logits(again), logits(model))


def test_embeddings_split_by_columns_as_before_llama_3(tmp_path):
    model = save_meta(tmp_path / "meta", files=2, embedding_axis=1)
    convert(tmp_path / "meta", tmp_path / "hf", Plan())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), logits(model))


@pytest.mark.parametrize("files", [1, 2, 4])
def test_what_is_written_in_metas_layout_is_what_meta_would_write(files, tmp_path):
    model = save_meta(tmp_path / "meta", files=files)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", Plan(to="meta", files=files))
    for rank in range(files):
        name = f"consolidated.{rank:02d}.pth"
        ours, theirs = (torch.load(d / name, weights_only=True) for d in (tmp_path / "out", tmp_path / "meta"))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].is_contiguous() for n in theirs)
    one, other = (open_layout(tmp_path / d) for d in ("out", "meta"))
    assert one.config == other.config


def test_llama_3_2_with_a_tied_head_and_scaled_frequencies(tmp_path):
    model = save_meta(tmp_path / "meta", name="tied", rope_parameters=SCALED, params={"use_scaled_rope": True})
    convert(tmp_path / "meta", tmp_path / "hf", Plan(hints=Hints(rope_factor=32.0)))
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert again.config.rope_parameters["factor"] == 32.0 and torch.equal(logits(again), logits(model))
    convert(tmp_path / "hf", tmp_path / "back", Plan(to="meta"))
    assert read_json(tmp_path / "back" / "params.json")["rope_scaling_factor"] == 32.0
    ours, theirs = (torch.load(tmp_path / d / "consolidated.00.pth", weights_only=True) for d in ("back", "meta"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_by_how_much_frequencies_are_scaled_is_never_guessed(tmp_path, refusal):
    model = save_meta(tmp_path / "meta", rope_parameters=SCALED, params={"use_scaled_rope": True})
    assert "--rope-scaling-factor" in refusal("params.json", open_layout, tmp_path / "meta")
    model.save_pretrained(tmp_path / "hf")
    like = read_json(tmp_path / "hf" / "config.json")
    assert open_layout(tmp_path / "meta", None, Hints(like=like)).hf == like
    other = {**like, "rope_parameters": {**SCALED, "low_freq_factor": 2.0}}
    assert "rope" in refusal("params.json", open_layout, tmp_path / "meta", None, Hints(like=other))
    other = {**like, "num_key_value_heads": 8}
    assert "num_key_value_heads is 4" in refusal("--like", open_layout, tmp_path / "meta", None, Hints(like=other))


def test_a_factor_where_nothing_is_scaled_is_refused(tmp_path, refusal):
    save_meta(tmp_path / "meta")
    assert "does not belong" in refusal("params.json", open_layout, tmp_path / "meta", None, Hints(rope_factor=8.0))


def test_the_buffer_of_frequencies_is_left_out_only_if_it_says_the_same(tmp_path, refusal):
    right = 1.0 / (10000.0 ** (torch.arange(0, 8, 2).float() / 8))
    save_meta(tmp_path / "meta", extra={"rope.freqs": right.bfloat16()})
    assert "rope.freqs" in open_layout(tmp_path / "meta").notes[0]
    save_meta(tmp_path / "other", extra={"rope.freqs": 2 * right})
    assert "rope.freqs differs" in refusal("consolidated.00.pth", open_layout, tmp_path / "other")


WRONG_PARAMS = {
    "an unknown field": ({"use_qk_norm": True}, "use_qk_norm"),
    "a vision tower": ({"vision_chunk_size": 448}, "vision_chunk_size"),
    "quantisation": ({"quantization_args": {"scheme": "int4"}}, "quantization_args"),
    "a size that is none": ({"dim": "64"}, "dim is '64'"),
    "a negative size": ({"n_layers": -3}, "n_layers is -3"),
    "a size of another model": ({"multiple_of": 256}, "gate_proj.weight has shape"),
    "more layers": ({"n_layers": 4}, "layers.3.attention_norm.weight is missing"),
    "fewer layers": ({"n_layers": 2}, "layers.2"),
    "fewer heads": ({"n_kv_heads": 2}, "attention.wk.weight has shape"),
    "no theta": ({"rope_theta": None}, "rope_theta"),
    "theta that is none": ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    "a multiplier that is none": ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
    "a flag that is none": ({"use_scaled_rope": "no"}, "use_scaled_rope is 'no'"),
    "heads that do not divide": ({"n_heads": 7}, "does not divide"),
}


@pytest.mark.parametrize(("change", "said"), WRONG_PARAMS.values(), ids=WRONG_PARAMS.keys())
def test_params_that_do_not_fit_are_refused_by_name(change, said, tmp_path, refusal):
    save_meta(tmp_path / "meta", params=change)
    assert said in refusal(tmp_path / "meta", open_layout, tmp_path / "meta")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("consolidated.01.pth", "without a gap"), ("params.json", "config.json"), ("consolidated.00.pth", "gap")],
)
def test_a_file_that_is_missing_is_named(missing, said, tmp_path, refusal):
    save_meta(tmp_path / "meta", files=4)
    (tmp_path / "meta" / missing).unlink()
    assert said in refusal(tmp_path / "meta", open_layout, tmp_path / "meta")


def test_parallel_files_that_disagree_are_refused(tmp_path, refusal):
    save_meta(tmp_path / "meta", files=2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    part = torch.load(path, weights_only=True)
    torch.save({**part, "norm.weight": part["norm.weight"] + 1}, path)
    assert "norm.weight differs" in refusal(path, open_layout, tmp_path / "meta")
    torch.save({n: t for n, t in part.items() if n != "layers.1.attention.wq.weight"}, path)
    assert "layers.1.attention.wq.weight" in refusal(path, open_layout, tmp_path / "meta")
    torch.save({**part, "layers.1.attention.wq.weight": part["layers.1.attention.wq.weight"].half()}, path)
    assert "layers.1.attention.wq.weight is float16" in refusal(path, open_layout, tmp_path / "meta")


def test_every_tensor_that_is_missing_renamed_or_of_another_shape_is_named(tmp_path, refusal):
    save_meta(tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    whole = torch.load(path, weights_only=True)
    for name, tensor in whole.items():
        rest = {n: t for n, t in whole.items() if n != name}
        if name != "output.weight":  # without it the head is the embedding, as Llama 3.2 has it
            torch.save(rest, path)
            assert name in refusal(tmp_path, open_layout, tmp_path / "meta")
        torch.save({**rest, f"{name}_": tensor}, path)
        assert name.split("_")[0] in refusal(tmp_path, open_layout, tmp_path / "meta")
        torch.save({**rest, name: tensor[:-1].clone()}, path)
        refusal(tmp_path, open_layout, tmp_path / "meta")


# --- Mistral ------------------------------------------------------------------------------------------------------


def save_mistral(directory, *, dtype=torch.float32, torch_file=False, params=None, **more):
    model = in_dtype(make_model("mistral", **{**SIZES, **MISTRAL, **more}), dtype)
    directory.mkdir()
    state = original_state(model)
    if torch_file:
        torch.save(state, directory / "consolidated.00.pth")
    else:
        save_file({n: t.contiguous() for n, t in state.items()}, directory / "consolidated.safetensors")
    own = params_of(
        model.config, head_dim=model.config.head_dim, hidden_dim=model.config.intermediate_size, **(params or {})
    )
    (directory / "params.json").write_text(json.dumps(own))
    return model


@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mistral_becomes_the_model_that_it_is_and_back(torch_file, dtype, tmp_path):
    model = save_mistral(tmp_path / "mistral", dtype=dtype, torch_file=torch_file)
    convert(tmp_path / "mistral", tmp_path / "hf", Plan())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert again.dtype == dtype and again.config.sliding_window is None and again.config.head_dim == 16
    assert torch.equal(logits(again), logits(model))
    convert(tmp_path / "hf", tmp_path / "back", Plan(to="mistral"))
    state, back = original_state(in_dtype(model, dtype)), load_file(tmp_path / "back" / "consolidated.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[n], t) and back[n].dtype == dtype for n, t in state.items())
    assert open_layout(tmp_path / "back").config == open_layout(tmp_path / "hf").config


def test_mixtral_becomes_the_model_that_it_is_and_back(tmp_path):
    model = make_model("mixtral", **{**SIZES, "head_dim": 8})
    model.save_pretrained(tmp_path / "hf")
    state = {}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        inner = name.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        for theirs, ours in {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
                             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
                             "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
                             "self_attn.o_proj": "attention.wo"}.items():  # fmt: skip
            inner = inner.replace(theirs, ours)
        if inner.endswith(("wq.weight", "wk.weight")):
            tensor = tensor.view(-1, 2, 4, 64).transpose(1, 2).reshape(tensor.shape)
        state[inner] = tensor.contiguous()
    (tmp_path / "mistral").mkdir()
    save_file(state, tmp_path / "mistral" / "consolidated.safetensors")
    mixture = {"num_experts": 8, "num_experts_per_tok": 2}
    params = params_of(model.config, head_dim=8, hidden_dim=96, moe=mixture)
    (tmp_path / "mistral" / "params.json").write_text(json.dumps(params))
    convert(tmp_path / "mistral", tmp_path / "out", Plan(), verify=lambda one, other: None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    convert(tmp_path / "hf", tmp_path / "back", Plan(to="mistral"))
    back = load_file(tmp_path / "back" / "consolidated.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[n], t) for n, t in state.items())
    assert read_json(tmp_path / "back" / "params.json")["moe"] == mixture


WRONG_MISTRAL = {
    "an unknown field": ({"yarn": {"factor": 16}}, "yarn"),
    "a vision tower": ({"vision_encoder": {}}, "vision tower"),
    "biases": ({"use_biases": True}, "use_biases"),
    "a tied head that is none": ({"tied_embeddings": True}, "tied_embeddings"),
    "no theta": ({"rope_theta": None}, "rope_theta"),
    "a window that is none": ({"sliding_window": "4096"}, "sliding_window"),
    "another head_dim": ({"head_dim": 8}, "attention.wq.weight has shape"),
}


@pytest.mark.parametrize(("change", "said"), WRONG_MISTRAL.values(), ids=WRONG_MISTRAL.keys())
def test_mistral_params_that_do_not_fit_are_refused_by_name(change, said, tmp_path, refusal):
    model = save_mistral(tmp_path / "mistral")
    own = params_of(model.config, head_dim=16, hidden_dim=model.config.intermediate_size)
    (tmp_path / "mistral" / "params.json").write_text(json.dumps({**own, **change}))
    assert said in refusal(tmp_path / "mistral", open_layout, tmp_path / "mistral")


# --- what a layout cannot say -------------------------------------------------------------------------------------

UNSAYABLE = {
    "head_dim": ("gqa untied", {"head_dim": 14}, "meta", "head_dim is 14"),
    "Llama in Mistral's": ("gqa untied", {}, "mistral", "LlamaForCausalLM"),
    "Mistral in Meta's": ("mistral", {}, "meta", "MistralForCausalLM"),
    "odd scaling": ("llama3 scaling beyond the original length", {}, "meta", "original_max_position_embeddings"),
}


@pytest.mark.parametrize(("name", "more", "to", "said"), UNSAYABLE.values(), ids=UNSAYABLE.keys())
def test_what_a_layout_cannot_say_is_refused_by_name(name, more, to, said, tmp_path, refusal):
    save_model(name, tmp_path / "hf", **more)
    assert said in refusal(tmp_path / "hf", convert, tmp_path / "hf", tmp_path / "out", Plan(to=to))
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("files", [0, 3, 65])
def test_files_that_would_cut_heads_are_refused(files, tmp_path):
    save_model("gqa untied", tmp_path / "hf", **SIZES)
    with pytest.raises(LlmtuneError, match=f"--files {files}"):
        convert(tmp_path / "hf", tmp_path / "out", Plan(to="meta", files=files))


PUBLISHED = {
    (4096, 14336): (1.3, 1024),
    (8192, 28672): (1.3, 4096),
    (16384, 53248): (1.2, 4096),
    (2048, 8192): (1.5, 256),
}


@pytest.mark.parametrize(("sizes", "factors"), PUBLISHED.items(), ids=str)
def test_inner_sizes_are_the_published_ones(sizes, factors):
    assert inner_size(sizes[0], *factors) == sizes[1] and inner_factors(*sizes) == factors
    assert inner_size(3072, 1.0, 256) == 8192 and inner_size(4096, None, 256) == 11008  # Llama 3.2 3B, Llama 2 7B


def test_every_inner_size_can_be_said():
    draw = np.random.default_rng(0)
    for dim, inner in zip(draw.integers(8, 20000, 500), draw.integers(8, 60000, 500), strict=True):
        assert inner_size(int(dim), *inner_factors(int(dim), int(inner))) == inner
