"""Prompts and prefixes against peft: logits, greedy completions, twenty steps of training, directories both ways."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoder, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import llmtune
from llmtune import pretrained
from llmtune.config import Sharding
from llmtune.config.file import build_run
from llmtune.model import build_params
from llmtune.models.decoder import declare
from llmtune.sharding import make_mesh
from llmtune.training.adapting import choose_transform
from llmtune.training.weights import choose_layout
from llmtune.weights import EncodedPrompt, Recurrence, RecurrentPrompt
from tests.parity.reference import save_model
from tests.parity.torch_training import cosine, train_peer
from tests.runs import STEPS, curve, run_config, write_rows

METHODS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=24),
    "a projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=24
    ),
}
TOKENS = np.random.default_rng(0).integers(3, 199, (2, 50))


def fresh(base, method):
    torch.manual_seed(0)
    config = copy.deepcopy(METHODS[method])  # peft fills in the base's shape
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)


def make_adapter(base, path, method):
    fresh(base, method).save_pretrained(path)
    return path


def load_theirs(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def peft_logits(base, adapter, tokens=TOKENS):
    with torch.no_grad():
        return load_theirs(base, adapter)(torch.tensor(tokens)).logits.numpy()[:, -tokens.shape[1] :]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("gqa untied", tmp_path_factory.mktemp("base") / "hf")


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "method",
    [
        "prompt",
        "prefix",
        pytest.param("p-tuning", marks=NIGHTLY),
        pytest.param("a projected prefix", marks=NIGHTLY),
    ],
)
def test_peft_and_llmtune_read_each_other(base, tmp_path, method):
    adapter = make_adapter(base, tmp_path / "theirs", method)
    model, expected = llmtune.load(base, adapters=[adapter]), peft_logits(base, adapter)
    assert np.abs(expected - llmtune.load(base).logits(TOKENS)).max() > 0.01  # the adapter matters
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)
    model.save_adapter(tmp_path / "ours")
    np.testing.assert_allclose(peft_logits(base, tmp_path / "ours"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [pytest.param("prompt", marks=NIGHTLY), "prefix"])
def test_greedy_completions_are_those_of_peft(base, tmp_path, method):
    adapter = make_adapter(base, tmp_path / "adapter", method)
    prompt, model = torch.tensor(TOKENS[:, :9]), llmtune.load(base, adapters=[adapter])
    theirs = load_theirs(base, adapter).generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )[:, -20:].tolist()  # fmt: skip
    ends = [row.index(2) if 2 in row else len(row) for row in theirs]
    theirs = [row[:end] for row, end in zip(theirs, ends, strict=True)]
    short = TOKENS[:1, :4].tolist()  # a batch of several lengths
    assert model.generate([*short, *TOKENS[:, :9].tolist()], max_new_tokens=20)[1:] == theirs


WINDOWED, PATTERN, WIDE = "mistral with a window", "ministral, interleaved windows", "head_dim unlike hidden / heads"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(PATTERN, "prefix", marks=NIGHTLY),
        pytest.param(PATTERN, "prompt", marks=NIGHTLY),
        pytest.param(WINDOWED, "prefix", marks=NIGHTLY),
        pytest.param(WINDOWED, "prompt", marks=NIGHTLY),
        pytest.param(WIDE, "prefix", marks=NIGHTLY),
    ],
)
def test_other_architectures(tmp_path, name, method):
    base = save_model(name, tmp_path / "hf")
    if name == WIDE:  # peft cannot make one: it has no such width
        model = llmtune.load(base, adapters=[_wide_prefix(base, tmp_path)])
        expected = peft_logits(base, tmp_path / "wide")
    else:
        adapter = make_adapter(base, tmp_path / "theirs", method)
        model, expected = llmtune.load(base, adapters=[adapter]), peft_logits(base, adapter)
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-4, rtol=0)


def _wide_prefix(base, directory):
    """A prefix of ours on a model whose heads are not hidden / heads wide, as save_adapter writes it."""
    rows = write_rows(directory / "rows.jsonl", TOKENS[None], TOKENS[None])
    run = run_config(directory, base, rows, adapt={"method": "prefix_tuning", "virtual_tokens": 7},
                     train={"steps": 1, "batch_size": 2, "dtype": "float32"})  # fmt: skip
    llmtune.train(run)
    (directory / "run/export/adapter").rename(directory / "wide")
    return directory / "wide"


def token_loss(model, tokens, labels, *, virtual):
    """Mean cross-entropy over the targets; peft gives logits for a prompt's own places too, and none for a prefix's."""
    logits = model(torch.tensor(tokens)).logits[:, virtual:-1]
    targets = torch.tensor(labels)[:, 1:].long()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100
    )


@pytest.mark.parametrize(("method", "virtual"), [("prompt", 7), ("prefix", 0)])
def test_twenty_steps_follow_peft(stories, batches, tmp_path, method, virtual):
    model = fresh(stories, method)  # peft takes up no prompt from a directory
    model.save_pretrained(adapter := tmp_path / "adapter")
    data = write_rows(tmp_path / "rows.jsonl", *batches)
    losses, norms = curve(run_config(tmp_path, stories, data, adapt={"from": str(adapter)}))
    peer = train_peer(
        model, zip(*batches, strict=True), learning_rate=1e-3, schedule=cosine(STEPS, 3),
        weight_decay=0.1, clip_norm=1.0, loss_of=functools.partial(token_loss, virtual=virtual),
    )  # fmt: skip
    np.testing.assert_allclose(losses, [loss for loss, _ in peer], rtol=1e-4)
    np.testing.assert_allclose(norms, [norm for _, norm in peer], rtol=1e-3)
    exported, tokens = tmp_path / "run/export/adapter", batches[0][0]
    expected = peft_logits(stories, exported, tokens)
    np.testing.assert_allclose(llmtune.load(tmp_path / "run").logits(tokens), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - peft_logits(stories, adapter, tokens)).max() > 1e-3  # it moved


def test_the_encoder_of_p_tuning_is_that_of_peft():
    """Given its weights: one linear layer after another, relu between them."""
    torch.manual_seed(0)
    theirs = PromptEncoder(PromptEncoderConfig(
        peft_type="P_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=12, encoder_hidden_size=9,
        num_transformer_submodules=1, num_attention_heads=1, num_layers=1,
    ))  # fmt: skip
    layers = [theirs.mlp_head[n] for n in (0, 2, 4)]
    arrays = [theirs.embedding.weight, *(x for layer in layers for x in (layer.weight.T, layer.bias))]
    ours = EncodedPrompt(*(jnp.asarray(x.detach().numpy()) for x in arrays))
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])), torch.no_grad():
        np.testing.assert_allclose(ours.vectors(), theirs(torch.arange(5)).numpy(), atol=1e-6)


def test_the_recurrent_encoder_of_p_tuning_is_that_of_peft():
    """Given its weights: the vectors, and the gradients of all that trains."""
    torch.manual_seed(0)
    theirs = PromptEncoder(PromptEncoderConfig(
        peft_type="P_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=12, encoder_hidden_size=9,
        encoder_reparameterization_type="LSTM", encoder_dropout=0.0,
        num_transformer_submodules=1, num_attention_heads=1, num_layers=1,
    ))  # fmt: skip
    lstm = dict(theirs.lstm_head.named_parameters())

    def layer(n, read):
        names = {"w_in": "weight_ih", "w_back": "weight_hh", "b_in": "bias_ih", "b_back": "bias_hh"}
        both = {ours: [read(lstm[f"{name}_l{n}{way}"]) for way in ("", "_reverse")] for ours, name in names.items()}
        return Recurrence(**{ours: np.stack([own.T for own in pair]) for ours, pair in both.items()})

    def prompt(read):
        head = (read(own).T for n in (0, 2) for own in (theirs.mlp_head[n].weight, theirs.mlp_head[n].bias))
        return RecurrentPrompt(read(theirs.embedding.weight), layer(0, read), layer(1, read), *head)

    ours = prompt(lambda own: own.detach().numpy())
    pull = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    out = theirs(torch.arange(5)[None])[0]
    (out * torch.tensor(pull)).sum().backward()
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        vectors, back = jax.vjp(lambda own: own.vectors(), jax.tree.map(jnp.asarray, ours))
        np.testing.assert_allclose(vectors, out.detach().numpy(), atol=1e-6)
        found, expected = back(jnp.asarray(pull))[0], prompt(lambda own: own.grad.numpy())
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), found, expected)


@pytest.mark.parametrize(("number", "strategy"), [(3, None), (16, "fsdp")])
def test_a_prompt_that_begins_as_a_text_begins_as_in_peft(stories, number, strategy):
    """A text longer than the prompt is cut, a shorter one repeated."""
    text = "Once upon a time there was a dog."
    settings = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=number, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(stories),
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32), settings)
    expected = model.prompt_encoder["default"].embedding.weight.detach().numpy()

    run = build_run({
        "model": str(stories), "output": "out", "data": {"train": "rows", "packing": False},
        "adapt": {"method": "prompt_tuning", "virtual_tokens": number, "initial_text": text},
    }, "run.yaml")  # fmt: skip
    source = pretrained.open_source(str(stories))
    declared = declare(source.config)[1]
    transform = choose_transform([run.adapt], source, declared, grown=False).transform
    mesh, table = choose_layout(strategy and Sharding(strategy), declared, jax.devices()[: 8 if strategy else 1])
    prompt = build_params(source, declared, transform, mesh, table, dtype=None)["prompt"]
    np.testing.assert_array_equal(prompt.table, expected)
