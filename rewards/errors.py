"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a value, a name.

    Its text is one clear sentence: what came, what was expected, what to do. Commands print it without
    a traceback and exit with code 2.
    """
