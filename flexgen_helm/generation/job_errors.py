"""Errors that belong to one job, whatever else is computed beside it."""

from __future__ import annotations

import torch

from flexgen_helm.errors import FlexGenError, JobFailed, NotFinite, OutOfSpace

DAMAGED = "If that does not help, the weights are damaged: fetch the checkpoint again."


def not_finite(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> str:
    """Say why numbers are not finite, and what to do; the subject of the sentence comes before it.

    Args:
        dtype: Of the model.
        kv_dtype: In which K and V are kept; None: in the model's.
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
    """The error of a job in which a number was not finite."""
    return NotFinite(f"The prompt, or what was generated behind it, {not_finite(dtype, kv_dtype)}")


def impossible(token_id: int, position: int) -> NotFinite:
    """The error of a job that asks for the logarithm of 0.

    Args:
        token_id: Of the prompt.
        position: Among the prompt's tokens.
    """
    return NotFinite(
        f"Token {token_id} at position {position} of the prompt has probability 0, because the model suppresses it (its logit "
        "is -inf). So its log-probability is not a finite number. Score a prompt without this token."
    )


def of_one_job(error: Exception) -> FlexGenError:
    """What a job is told that met an error in code, or for whose answer memory did not suffice."""
    if isinstance(error, FlexGenError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
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
