"""Text that a model writes itself, for the statistics of schemes that are fitted to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.source import LoadedModel
from flexgen_helm.runtime.fitting.files import load_checked, save_checked
from flexgen_helm.types import Job, Result

NUM_ROWS, ROW_TOKENS = 16, 512
"""Sequences, and tokens in each with the end token in front."""
SEED = 0
DESCRIPTION = f"{NUM_ROWS} x {ROW_TOKENS} tokens that the model wrote at temperature 1, seed {SEED}"
FILE, NAME = "own_text.safetensors", "tokens"


def first_token(loaded: LoadedModel) -> int:
    """Return the token behind which a model begins a text: its lowest end token."""
    return min(loaded.end_token_ids, default=0)


def writing_job(loaded: LoadedModel) -> Job:
    """Return the job that writes the text. No token ends a sequence: behind an end token the model begins another text."""
    length = min(ROW_TOKENS, loaded.max_length)
    return Job(
        token_ids=[first_token(loaded)],
        max_new_tokens=length - 1,
        temperature=1.0,
        num_completions=NUM_ROWS,
        seed=SEED,
        ignore_eos=True,
    )


def written(job: Job, result: Result) -> Tensor:
    """Return the text of the job's result, int64 ``[rows, tokens]``, with the token in front."""
    front: Sequence[int] = job.token_ids or ()
    return torch.tensor([[*front, *completion.token_ids] for completion in result.completions])


def kept_text(folder: Path, write: Callable[[Path], Tensor]) -> Tensor:
    """Return the text that is kept in a folder; it is written first if it is missing.

    Args:
        folder: Folder of the statistics.
        write: Lets the model write, with what it keeps on disk in a folder.

    Raises:
        CorruptFile: If the file is torn.
        DiskFull: If there is no space for it.
    """
    file = folder / FILE
    if not file.exists():
        scratch = folder / "uncompressed"
        save_checked(file, {NAME: write(scratch)})
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        return load_checked(file)[NAME]
    except CorruptFile as error:
        raise CorruptFile(f"{error} Delete it; it is made again.") from error
