"""Make the errors of single jobs, which do not affect other jobs of the same batch."""

from __future__ import annotations

import torch

from flexgen_helm.errors import FlexGenError, JobFailed, NotFinite, OutOfSpace
from flexgen_helm.memory.out_of_memory import is_out_of_device_memory

DAMAGED = "If that does not help, the weights are damaged: fetch the checkpoint again."
"""Sentence for users, after the advice to use another dtype."""


def not_finite(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> str:
    """Return why a computation gave NaN or infinity, and a remedy. The caller puts the subject of the sentence before it.

    Args:
        dtype: The dtype of the weights.
        kv_dtype: The dtype of the K/V cache. None means the dtype of the weights.
    """
    if dtype == torch.float16:
        return f"overflows in float16: use bfloat16 or float32 (dtype). Numbers above 65504 become infinity there. {DAMAGED}"
    if kv_dtype == torch.float16:
        return (
            "overflows in float16, in which K and V are kept: use bfloat16 or float32 (kv_dtype). Numbers above 65504 become "
            f"infinity there. {DAMAGED}"
        )
    name = str(dtype).removeprefix("torch.")
    return (
        f"gives NaN or infinity in {name}, which holds numbers up to 3e38: the weights are damaged, or the model itself "
        "computes such values. Fetch the checkpoint again, or use another model."
    )


def overflow(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> NotFinite:
    """Return the error of a job for which the model computed NaN or infinity.

    Args:
        dtype: The dtype of the weights.
        kv_dtype: The dtype of the K/V cache. None means the dtype of the weights.
    """
    return NotFinite(f"The prompt, or the text generated after it, {not_finite(dtype, kv_dtype)}")


def impossible(token_id: int, position: int) -> NotFinite:
    """Return the error of a job that scores a prompt with a token of probability 0, whose logarithm is not finite.

    Args:
        token_id: The token.
        position: Its position among the prompt's tokens, from 0.
    """
    return NotFinite(
        f"Token {token_id} at position {position} of the prompt has probability 0, because the model suppresses it (its logit "
        "is -inf). So its log-probability is not a finite number. Score a prompt without this token."
    )


def of_one_job(error: Exception) -> FlexGenError:
    """Return the error to report for one job, for any exception that was raised while it was computed.

    A `FlexGenError` is returned as it is, and lack of memory becomes `OutOfSpace`. Any other exception is a fault in code and
    becomes `JobFailed`. The exception is the cause of the new error.
    """
    if isinstance(error, FlexGenError):
        return error
    if isinstance(error, MemoryError) or is_out_of_device_memory(error):
        found: FlexGenError = OutOfSpace(
            f"Memory does not suffice for this job ({error}). Shorten the prompt, ask for fewer or shorter completions, or "
            "free memory."
        )
    else:
        found = JobFailed(
            f"This job failed in code ({type(error).__name__}: {error}). Other jobs are not affected. Report the message "
            "with the job and the model."
        )
    found.__cause__ = error
    return found
