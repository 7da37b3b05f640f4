"""What a command line can get wrong beside the config: a word, or the name of a run."""

from rl.runs.run_folder import RunFolder, RunFolderError


class UsageError(ValueError):
    """Raised when a command line names something that is not there. The message is one line and says what is."""


def resolve_run(root: str, run: str) -> RunFolder:
    """Raises `UsageError` where RUN names no run."""
    try:
        return RunFolder.resolve(root, run)
    except RunFolderError as error:
        raise UsageError(str(error)) from None
