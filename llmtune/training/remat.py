"""What a block keeps for the backward pass, by the name that a run gives.

Blocks name what is worth keeping (`jax.ad_checkpoint.checkpoint_name`): what costs a product with a weight, or attention, to
form again. All else is elementwise, and cheaper to compute twice than to write and read; gathered weights are never kept,
since under fully sharded training they would be the whole model. Blocks stand in a scan, which by itself keeps the compiler
from merging the two computations: `prevent_cse` would only stand in the way of fusion.
"""

import functools
from collections.abc import Callable

import jax

from llmtune.models.decoder import INPUT

ATTENTION = ("attention", "attention_log_sum")
KEPT = ("q", "k", "v", *ATTENTION, "attended", "gate", "up", "low_rank")

POLICIES: dict[str, Callable[[Callable], Callable]] = {
    "none": functools.partial(  # no product is formed twice
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*KEPT)
    ),
    "dots": functools.partial(  # results of products with weights; attention is computed again
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "attention": functools.partial(  # attention is not computed again, all else is
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*ATTENTION)
    ),
    "block": functools.partial(jax.checkpoint, prevent_cse=False),  # only the block's input: all else again
    "offload": functools.partial(  # nothing on the device: the block's input waits in the host's memory
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}
