"""The error of users' mistakes, apart from everything else that can go wrong."""


class LowlineError(ValueError):
    """A mistake that the user can correct; the message says where it is and what to do.

    The command line prints it in one line. Every other exception is a fault of lowline or of the
    machine, and keeps its traceback.
    """


class MissingFileError(LowlineError, FileNotFoundError):
    """A file, directory, model or data set that was named and is not there."""


def one_line(error: BaseException) -> str:
    """Return the message of a library's error in one line."""
    return " ".join(str(error).split())
