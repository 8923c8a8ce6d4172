"""What every part of the bed raises."""


class BedError(RuntimeError):
    """A cluster can't be built, changed or asked. The message names the object, and the log file if there is one."""
