"""The one exception for a user's mistake: a sentence with the offending value and the way out."""


class UsageError(ValueError):
    """Wrong input to this package. The command line prints its text and exits with status 2, without a traceback."""


class DivergedError(UsageError):
    """Weights became NaN in training. A search over learning rates goes on with another one."""
