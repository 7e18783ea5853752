"""Errors a user can cause. Every message says what was got, what was expected and what to do next."""


class LoftQError(ValueError):
    """Base of all errors raised for a user's mistake; the command line prints it and exits with code 2."""


class ConfigError(LoftQError):
    """A setting that does not exist, is out of range, or contradicts another."""


class WeightError(LoftQError):
    """A weight that cannot be quantized: NaN, infinite, empty, or of the wrong shape."""


class SourceError(LoftQError):
    """A source checkpoint that is missing, truncated or inconsistent."""


class OutputError(LoftQError):
    """An output directory that cannot be written or holds something else."""


class BackboneMismatchError(LoftQError):
    """An adapter that does not belong to the quantized backbone it is applied to."""
