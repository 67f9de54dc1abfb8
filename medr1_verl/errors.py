"""The one exception that a user sees as a single line."""


class UserError(Exception):
    """A foreseeable fault in what the user gave: says what, where and what to do, in one line.

    ``medr1`` prints it to standard error without a traceback and exits with 2.
    """
