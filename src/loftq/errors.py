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


class ClusterError(LoftQError):
    """A Ray cluster that cannot be reached, or whose workers cannot do their part."""


class BackboneMismatchError(LoftQError):
    """An adapter that does not belong to the quantized backbone it is applied to."""


class LoftQWarning(UserWarning):
    """Something that a user should know and that does not end the work; the command line prints it as its other notes."""


def counted(number: int, thing: str) -> str:
    """``1 window``, ``2 windows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Another library's message in one line, which may be long or empty; with the next where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
