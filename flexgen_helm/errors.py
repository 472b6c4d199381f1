"""Errors that a user can cause. Every message says what is wrong, why, and what to do."""


class FlexGenError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnsupportedModel(FlexGenError):
    """The model would be computed wrongly, so it is refused by name and reason."""


class InvalidJob(FlexGenError):
    """A job that cannot be served: empty prompt, longer than the context, a field out of range."""


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
