"""The errors that users meet."""


class HfEsmError(ValueError):
    """Bad input. The message names the file, expert or weight and what to do; the command line prints it alone."""


class HubError(HfEsmError):
    """The Hub refuses something, or cannot be reached."""
