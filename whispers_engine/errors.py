"""The one exception for bad input: its message says what was found and what is accepted. The CLI prints it and nothing else."""


class WhispersError(ValueError):
    """Input that the engine refuses, before any work was started on it."""
