"""The one error the lab's user sees: a sentence that says what is wrong and what to do."""


class LabError(Exception):
    """Something the user can act on; shown without a traceback."""
