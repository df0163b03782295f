"""The model as a library user holds it: load, look at logits, generate, save.

model = llmtune.load("path/to/hf_dir", adapters=["path/to/peft_dir"])
model.logits(tokens)                                float32 [batch, seq, vocab]
model.generate(["Once upon"], max_new_tokens=64)    completions only
model.save("merged"), model.save_adapter("adapter")
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmtune import pretrained
from llmtune.errors import LlmtuneConfigError
from llmtune.freed_memory import give_back_freed_memory
from llmtune.generation.engine import Engine
from llmtune.generation.layers import for_many_calls
from llmtune.generation.sampling import Sampling
from llmtune.models.config import ModelConfig
from llmtune.models.decoder import declare
from llmtune.models.language_model import LanguageModel
from llmtune.origin import Base, base_of
from llmtune.sharding import REPLICATED, ShardingError, Strategy, axis_size, default_mesh, load_strategy, make_mesh, put
from llmtune.shipped import configs_directory
from llmtune.tokenizers import Tokenizer, check_fits, load_tokenizer
from llmtune.transforms import Transform, build, chain
from llmtune.weights import materialize, shardings

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """Weights in place on a mesh. `params` is a nested dict of arrays and operators (see `llmtune.models.decoder`)."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    source: pretrained.Source
    mesh: Mesh
    strategy: Strategy
    bind: Callable[[Any], LanguageModel]
    whole: tuple[str, ...] = ()  # paths of weights that an adapter brought in whole

    def logits(self, tokens: Any, *, positions: Any = None, segment_ids: Any = None) -> np.ndarray:
        """int32 [batch, seq] -> float32 [batch, seq, vocab].

        segment_ids (default: all 1): 0 is padding, 1.. are documents; tokens see their own document only. positions
        (default: index within the document) feed RoPE alone; causality goes by index in the row.
        """
        tokens = _rows("tokens", tokens)
        segment_ids = np.ones_like(tokens) if segment_ids is None else _rows("segment_ids", segment_ids, tokens.shape)
        positions = (
            document_positions(segment_ids) if positions is None else _rows("positions", positions, tokens.shape)
        )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise LlmtuneConfigError(f"tokens: ids must lie in 0..{self.config.vocab_size - 1}")
        batch = tokens.shape[0]
        if _documents(segment_ids) > 1 and self.bind(self.params).decoder().virtual_tokens():
            raise LlmtuneConfigError("segment_ids: with virtual tokens (a prompt or a prefix) a row holds one document")
        extra = -batch % axis_size(self.mesh, self.strategy.spec("batch")[0])
        layout = NamedSharding(self.mesh, self.strategy.spec("batch", "seq"))
        with jax.set_mesh(self.mesh):
            rows = (put(np.pad(x, ((0, extra), (0, 0))), layout) for x in (tokens, positions, segment_ids))
            logits = _logits(self.bind, self.strategy)(self.params, *rows)
        return np.asarray(logits)[:batch]

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> list[Any]:
        """Completions of prompts of any lengths, of the kind that was given: text for text, ids for ids.

        temperature 0 is greedy. The model's eos ids end a completion and are not part of it; nor is a `stop` text. A text
        prompt gets BOS as tokenizer_config.json says, and never becomes control tokens. On a CPU the first call copies the
        layers' weights as decoding reads them, and keeps that for the next ones until the model is gone or another generates.
        """
        if isinstance(prompts, str):
            raise LlmtuneConfigError("prompts: give a list of prompts, not one text")
        kinds = [isinstance(prompt, str) for prompt in prompts]
        if any(kinds) and not all(kinds):
            raise LlmtuneConfigError("prompts: give either texts or lists of token ids, not both")
        as_text, stops = bool(kinds and kinds[0]), [stop] if isinstance(stop, str) else list(stop)
        if (as_text or stops) and self.tokenizer is None:
            raise LlmtuneConfigError(
                f"{self.source.name}: it has no tokenizer; give prompts as lists of token ids, no stop"
            )
        rows = [encode_prompt(self.tokenizer, prompt) if as_text else list(map(int, prompt)) for prompt in prompts]
        completions = Engine(self.config, self.bind, self.mesh, self.strategy, for_many_calls).generate(
            self.params,
            rows,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            eos_ids=self.config.eos_token_ids,
            seed=seed,
            finished=lambda completion: _stopped(self.tokenizer, completion, stops) is not None,
        )
        if not as_text:
            return [_cut_ids(self.tokenizer, completion, stops) for completion in completions]
        texts = (decode_completion(self.tokenizer, *pair) for pair in zip(rows, completions, strict=True))
        return [_cut_text(text, stops) for text in texts]

    def save(self, path: str | Path, *, dtype: str | None = None) -> None:
        """A merged Hugging Face directory. dtype None: each tensor's dtype on disk, however it was loaded."""
        if dtype is not None:
            _check_dtype(dtype)
        with jax.set_mesh(self.mesh):
            pretrained.save(Path(path), self.params, self.source, dtype=dtype)

    def save_adapter(self, path: str | Path) -> None:
        """A PEFT directory: adapter_config.json + adapter_model.safetensors."""
        with jax.set_mesh(self.mesh):
            pretrained.save_adapter(Path(path), self.params, self.source, whole=self.whole)


def load(
    path: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    dtype: str | None = "float32",
    strategy: str | None = None,
) -> Model:
    """A Hugging Face directory, a preset with random weights, or a run directory of llmtune; PEFT adapters on top, in order.

    dtype None keeps each tensor as stored and computes in the embedding's dtype. strategy None uses one device; a name
    (`fsdp`, `tensor`) spreads the model over all devices. The base of a run is kept in the bits that it was
    trained on (`quantize`).
    """
    return read(base_of(path), adapters=adapters, dtype=dtype, strategy=strategy)


def read(base: Base, *, adapters: Sequence[str | Path], dtype: str | None, strategy: str | None) -> Model:
    """`load` of what a path was found to be."""
    if dtype is not None:
        _check_dtype(dtype)
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    source, own = pretrained.open_source(base.model), base.adapters
    source = source.apart() if base.untied else source
    for adapter in own:  # of a run: its tokenizer, chat template and ends of text need not be the base's
        source = pretrained.fit_to_adapter(source, adapter)
        source = pretrained.as_exported(source, adapter)
    for adapter in adapters:
        source = pretrained.fit_to_adapter(source, adapter)
    graphdef, declared = declare(source.config)
    declared = base.kept.apply(declared, base.kept.init(declared))
    loaded = [pretrained.load_adapter(adapter, source.config) for adapter in (*own, *adapters)]
    mesh, table = _layout(strategy, declared)
    home = source.tokenizer_directory
    tokenizer = None if home is None else load_tokenizer(home)
    if tokenizer is not None and home is not None:
        check_fits(tokenizer, source.config, home)
    transform = chain(*(adapter.transform for adapter in loaded))
    params = build_params(source, declared, transform, mesh, table, dtype=dtype)
    give_back_freed_memory()  # of what was read and converted
    compute = jnp.dtype(dtype) if dtype else params["embed"]["table"].dtype
    bind = functools.partial(LanguageModel, graphdef, dtype=compute)
    whole = tuple(dict.fromkeys(path for adapter in loaded for path in adapter.whole))
    return Model(source.config, params, tokenizer, source, mesh, table, bind, whole)


def build_params(
    source: pretrained.Source,
    declared: Any,
    transform: Transform,
    mesh: Mesh,
    strategy: Strategy,
    *,
    dtype: str | None,
    seed: int = 0,
    progress: pretrained.Progress = lambda done: None,
) -> Any:
    """Weights read straight into their shardings, and what the transform adds to them."""
    additions = transform.init(declared)
    with jax.set_mesh(mesh):
        params = pretrained.load(source, declared, mesh, strategy, dtype=dtype, seed=seed, progress=progress)
        drawn = materialize(additions, jax.random.key(seed), mesh, strategy)
        with strategy.active():
            return build(transform, params, drawn)


def _documents(segment_ids: np.ndarray) -> int:
    """The largest number of documents in a row."""
    return max((len(set(row) - {0}) for row in segment_ids.tolist()), default=0)


def document_positions(segment_ids: np.ndarray) -> np.ndarray:
    """Index of each token within its document: int32 [batch, seq] -> the same; documents are runs of one id."""
    index = np.broadcast_to(np.arange(segment_ids.shape[1], dtype=np.int32), segment_ids.shape)
    starts = np.ones_like(segment_ids, dtype=bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)


def encode_prompt(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """A text's ids, with BOS as tokenizer_config.json says."""
    assert tokenizer is not None
    return tokenizer.encode(prompt, bos=tokenizer.add_bos)


def decode_completion(tokenizer: Tokenizer | None, prompt: list[int], completion: list[int]) -> str:
    """What the completion adds to the prompt's text: its leading space too, which decoding it alone would lose."""
    assert tokenizer is not None
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *completion])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(completion)


@functools.lru_cache(maxsize=32)
def _logits(bind: Callable[[Any], LanguageModel], strategy: Strategy) -> Callable[..., jax.Array]:
    def logits(params: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        with strategy.active():
            return bind(params).logits(tokens, positions, segment_ids)

    return jax.jit(logits)


def _layout(strategy: str | None, declared: Any) -> tuple[Mesh, Strategy]:
    if strategy is None:
        return make_mesh({}, jax.devices()[:1]), REPLICATED
    table = load_strategy(strategy, configs_directory() / "strategies")
    mesh = default_mesh(table, lambda mesh: divides(declared, mesh, table))
    return mesh, table.on(mesh).whole_rows()


def divides(declared: Any, mesh: Mesh, strategy: Strategy) -> bool:
    """Whether every declared array divides over the mesh."""
    try:
        shardings(declared, mesh, strategy)
    except ShardingError:
        return False
    return True


def _rows(name: str, value: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise LlmtuneConfigError(f"{name}: an integer array [batch, seq] is needed, got {array.dtype} {array.shape}")
    if shape is not None and array.shape != shape:
        raise LlmtuneConfigError(f"{name}: shape {array.shape} differs from the tokens' {shape}")
    return array.astype(np.int32)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise LlmtuneConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")


def _stopped(tokenizer: Tokenizer | None, completion: list[int], stops: Sequence[str]) -> int | None:
    """Where in the completion's text the first stop text begins."""
    return _first_stop(tokenizer.decode(completion), stops) if stops and tokenizer is not None else None


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def _cut_text(text: str, stops: Sequence[str]) -> str:
    return text[: _first_stop(text, stops)]


def _cut_ids(tokenizer: Tokenizer | None, completion: list[int], stops: Sequence[str]) -> list[int]:
    at = _stopped(tokenizer, completion, stops)
    if at is None or tokenizer is None:
        return completion
    kept = len(completion)
    while kept and len(tokenizer.decode(completion[:kept])) > at:
        kept -= 1
    return completion[:kept]
