"""Working memory: the bytes that checking and computing take in addition to weights and cache, estimated from sizes."""

from __future__ import annotations

from flexgen_helm.attention.visits import WINDOW_CHUNKS
from flexgen_helm.machine.slices import SCRATCH_BYTES
from flexgen_helm.memory.amounts import LARGE_TENSOR_BYTES
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.stages.row_travel import token_travel_bytes, travel_bytes
from flexgen_helm.schedule.dependencies import MOST_SUSPENDED
from flexgen_helm.types import ResolvedPolicy

HIDDEN_COPIES = 4
"""Bytes of a token's hidden state, rotary table, and K and V in one layer, in units of the hidden state."""
LOGITS_COPIES = 3
"""Tensors of the size of the logits in fp32: logits, log-probabilities, and a sorted or summed copy."""
CHECKED_POSITIONS = 256
"""Positions of which the self-check holds log-probabilities over the vocabulary, packed and alone: 128 each."""
HOST_COPIES = 3
"""Tensors of the size of a row's queries in fp32 while the CPU attends beside a device: queries, weighted sums, and the sums'
sizes, which are less."""
SCORE_COPIES = 4
"""Copies of the scores of sparse attention: by chunk, by head, choices, and both together in turn."""
HIDDEN_SHARE = 0.1
"""Share of the memory left that a block's hidden states may take beyond those of the smallest block."""
MOST_BLOCK_TOKENS = 16_384
"""Most prompt tokens of a block. Larger blocks gain nothing if weights are resident, and finish their first job later."""
INNER_COPIES = 1.5
"""Activated, other and multiplied outputs of a gated layer's two inner matrices, over those two."""
OBJECT_BYTES = 2**20
"""Bytes of what is no tensor in a run: work, results, stacks of threads, what the allocator rounds up. Without it
two more of twelve peaks are predicted too low, by 0.7 and 0.9 MiB (runs/LOG.md)."""
FP32 = 4
"""Bytes of a float32."""


def working_bytes(shapes: ModelShapes, policy: ResolvedPolicy, *, is_mapped: bool = False) -> int:
    """Estimate the most bytes that computing takes: a row's activations, the smallest block's hidden states, a slice's logits.

    On a stage of a pipeline, rows of the smallest block on their way between stages are added.

    Args:
        shapes: Sizes of the model.
        policy: Row sizes.
        is_mapped: Whether large tensors have memory of their own, which is free again with them.
    """
    head = policy.gpu_batch_size * shapes.vocab_size * LOGITS_COPIES * shapes.has_head
    tokens = least_block_tokens(policy)
    kept = block_bytes(shapes, tokens) + travel_bytes(shapes, policy, tokens)
    return (int(policy.gpu_batch_tokens * _activations(shapes, policy, is_mapped)) + head) * FP32 + kept


def _activations(shapes: ModelShapes, policy: ResolvedPolicy, is_mapped: bool) -> float:
    """Return the elements of a layer's activations for a token of a row.

    The outputs of all matrices count as if they existed at the same time, and those behind attention half as often again, for
    what is computed between them. What attention takes in addition is free before those multiply; but an allocator that keeps
    freed memory between other tensors takes new memory for their outputs.
    """
    hidden, queries = 2 * shapes.hidden_size, shapes.num_heads * shapes.head_dim
    attending = (WINDOW_CHUNKS + 1) * queries + SCORE_COPIES * shapes.num_heads * shapes.scored_keys
    if not is_mapped or policy.gpu_batch_tokens * queries * FP32 < LARGE_TENSOR_BYTES:
        return shapes.outputs_per_token + hidden + attending
    projected = queries + 2 * shapes.num_kv_heads * shapes.head_dim + shapes.hidden_size
    behind = INNER_COPIES * (shapes.outputs_per_token - projected)
    return hidden + max(shapes.outputs_per_token, behind, projected + attending)


def widening_bytes(shapes: ModelShapes) -> int:
    """Return the bytes in which a CPU widens a slice of 16-bit weights, of which it has one, whatever the matrices' sizes.

    The library of products packs the slice once more (buffers of 1, 2, 4 and 8 MiB made a run grow by 1.7, 3.7, 7.4 and 13.5).
    Inputs and outputs of a product in fp32 are among the outputs that `working_bytes` counts.
    """
    return 2 * SCRATCH_BYTES if shapes.itemsize < FP32 else 0


def checking_bytes(shapes: ModelShapes, policy: ResolvedPolicy, *, whole: bool) -> int:
    """Estimate the bytes of the self-check in addition to the model that it checks.

    Args:
        shapes: Sizes of the model.
        policy: Row sizes.
        whole: Whether the whole model is checked; else its first layers, with a small vocabulary. In both cases those of a
            model in 16 bits are there in fp32, too.
    """
    copies = 0 if shapes.itemsize == FP32 else FP32 // shapes.itemsize
    vocab = shapes.vocab_size if whole else shapes.first_layers_vocab
    logprobs = CHECKED_POSITIONS * vocab * FP32
    return copies * shapes.first_layers_bytes + logprobs + working_bytes(shapes, policy)


def host_attention_bytes(shapes: ModelShapes, policy: ResolvedPolicy) -> int:
    """Return the bytes on the host of rows to which the CPU attends beside a device, pages left out.

    These are queries, K, V and outputs, for which torch's pinned memory has room for the next power of two, and queries, sums
    and outputs in fp32. One row attends while others are suspended.
    """
    itemsize = max(shapes.itemsize, shapes.kv_itemsize)
    q, kv = (policy.gpu_batch_size * heads * shapes.head_dim for heads in (shapes.num_heads, shapes.num_kv_heads))
    pinned = sum(1 << (count * itemsize - 1).bit_length() for count in (q, q, kv, kv))
    return (1 + MOST_SUSPENDED) * (pinned + HOST_COPIES * q * FP32)


def block_bytes(shapes: ModelShapes, num_tokens: int) -> int:
    """Return the bytes that prompt tokens keep between two layers.

    Args:
        shapes: Sizes of the model.
        num_tokens: Number of prompt tokens.
    """
    return num_tokens * shapes.hidden_size * shapes.itemsize * HIDDEN_COPIES


def least_block_tokens(policy: ResolvedPolicy) -> int:
    """Return the number of prompt tokens of the smallest block that is planned."""
    return policy.block_tokens or policy.num_gpu_batches * policy.gpu_batch_tokens


def block_tokens(shapes: ModelShapes, policy: ResolvedPolicy, left: int) -> int:
    """Return the number of prompt tokens of a block: the policy's, or as many as fit well into ``left`` bytes."""
    fitting = int(HIDDEN_SHARE * left) // (block_bytes(shapes, 1) + token_travel_bytes(shapes, policy))
    return policy.block_tokens or max(least_block_tokens(policy), min(MOST_BLOCK_TOKENS, fitting))
