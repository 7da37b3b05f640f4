"""What a command line can get wrong beside the config."""


class UsageError(ValueError):
    """Raised when a command line names something that is not there. The message is one line and says what is."""
