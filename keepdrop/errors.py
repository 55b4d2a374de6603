"""`UserError`, the one exception that means: the user can fix this; `Notice`, a warning that stops nothing."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a value, a name.

    Its text is one clear sentence: what came, what was expected, what to do. Commands print it without
    a traceback and exit with code 2.

    Args:
        text: the sentence, or its beginning where advice is written in two ways.
        python: its end for a caller from Python, who reads the exception.
        typed: its end for somebody who typed a command, which prints `typed`.
    """

    def __init__(self, text: str, python: str = "", typed: str = "") -> None:
        super().__init__(f"{text} {python}".rstrip())
        self.typed = f"{text} {typed}".rstrip()


class Notice(UserWarning):
    """What the user should know, and what stops nothing, in one sentence; commands print it as a warning."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to stand inside a sentence; "" where it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def summarised(error: BaseException) -> str:
    """Its type and, cut to 160 characters, its first line."""
    line = first_line(error)[:160]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
