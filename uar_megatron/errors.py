"""The errors a user of uar-megatron can see: what was wrong, what is allowed, what to do."""


class UARError(Exception):
    """Base of every error that is the user's to mend; the entries print it without a traceback."""

    exit_code = 2


class ConfigError(UARError):
    """A bad field of the configuration.

    Args:
        field: dotted name of the field, e.g. ``uar.budget.k_min``.
        problem: what is wrong, including the offending value.
        allowed: the values that would be accepted.
        remedy: what the user should do.
    """

    def __init__(
        self, field: str, problem: str, *, allowed: str | None = None, remedy: str | None = None
    ) -> None:
        self.field = field
        lines = [f"{field}: {problem}"]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if remedy:
            lines.append(f"  remedy:  {remedy}")
        super().__init__("\n".join(lines))


class DataError(UARError):
    """Training data, a tokenizer or a checkpoint that is missing, corrupt or does not match."""


class TrainingError(UARError):
    """Training cannot go on: a non-finite loss or router."""

    exit_code = 3


class UnsupportedEnvironmentError(UARError):
    """The machine or an installed package cannot run what was asked."""
