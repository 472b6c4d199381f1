"""Errors that a user can cause. Every message says what is wrong, why, and what to do."""

import errno
from collections.abc import Mapping

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Values of `OSError.errno` that mean an exhausted disk, quota or file size limit."""


class FlexGenError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnsupportedModel(FlexGenError):
    """A model that would be computed wrongly, refused with its name and the reason."""


class CompressionError(FlexGenError):
    """A compressed variant that does not exist, or whose parts do not go together."""


class InvalidJob(FlexGenError):
    """A job that cannot be served: empty prompt, longer than the context, a field out of range."""

    def __init__(self, message: str, **values: object) -> None:
        """Make the error.

        Args:
            message: Text that says what is wrong. With ``values`` it is a format string, in which ``{max_new_tokens}`` and
                other names of `JOB_WORDS` are replaced by the reader's words.
            values: Values of the other fields of the format string.
        """
        self._format, self._values = message, values
        super().__init__(self.in_words(JOB_WORDS))

    def in_words(self, words: Mapping[str, str]) -> str:
        """Return the message with other words for the fields of a job."""
        return self._format.format(**{**JOB_WORDS, **words}, **self._values) if self._values else self._format


JOB_WORDS = {name: name for name in ("max_new_tokens", "top_logprobs", "num_completions", "seed")} | {"jobs": "jobs"}
"""Words of messages for the fields of a job."""


class NotFinite(InvalidJob):
    """A job whose answer would hold NaN or infinity; no other job is affected."""


class JobFailed(FlexGenError):
    """A job for which code failed; no other job is affected."""


class PolicyError(FlexGenError):
    """A policy that is invalid, or that this model and machine cannot satisfy."""


class OutOfSpace(FlexGenError):
    """A lack of memory or disk space; the message names the needed and the available bytes."""


class DiskFull(OutOfSpace):
    """A lack of disk space while a file is written; the message says what was kept and how to continue."""


class CorruptFile(FlexGenError):
    """A file that is torn or missing, or whose checksum is wrong."""


class ScenarioError(FlexGenError):
    """A scenario whose arguments or data cannot be used."""


class StageLost(FlexGenError):
    """A stage of a pipeline that ended or cannot be reached; answers that were given so far are kept."""
