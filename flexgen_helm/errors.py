"""Errors that a user can cause. Every message says what is wrong, why, and what to do."""

import errno
from collections.abc import Mapping

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an `OSError`: a disk, a quota or a file size limit is exhausted."""


class FlexGenError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnsupportedModel(FlexGenError):
    """The model would be computed wrongly, so it is refused by name and reason."""


class InvalidJob(FlexGenError):
    """A job that cannot be served: empty prompt, longer than the context, a field out of range."""

    def __init__(self, message: str, **values: object) -> None:
        """Say what is wrong.

        Args:
            message: With ``values``, a format string, in which ``{max_new_tokens}`` and other names of `JOB_WORDS` stand for
                the words of whoever reads it.
            values: What the other fields of the format string stand for.
        """
        self._format, self._values = message, values
        super().__init__(self.in_words(JOB_WORDS))

    def in_words(self, words: Mapping[str, str]) -> str:
        """Return the message with other words for the fields of a job."""
        return self._format.format(**{**JOB_WORDS, **words}, **self._values) if self._values else self._format


JOB_WORDS = {name: name for name in ("max_new_tokens", "top_logprobs", "num_completions", "seed")} | {"jobs": "jobs"}
"""What messages call the fields of a job."""


class NotFinite(InvalidJob):
    """A job whose answer would hold NaN or infinity; no other job is affected."""


class JobFailed(FlexGenError):
    """A job that met an error in code; no other job is affected."""


class PolicyError(FlexGenError):
    """A policy that cannot be honoured on this model and machine."""


class OutOfSpace(FlexGenError):
    """Memory or disk is too small for what was asked; the message names both sizes."""


class DiskFull(OutOfSpace):
    """A file cannot be written any further; the message says what was kept and how to go on."""


class CorruptFile(FlexGenError):
    """A file that is torn, missing or not what its checksum says."""


class ScenarioError(FlexGenError):
    """A scenario whose arguments or data cannot be used."""
