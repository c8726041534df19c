"""The one error type that users meet."""


class HfEsmError(ValueError):
    """Bad input: the message names the file, expert or weight, and what to do. The command line prints it alone."""
