"""The one error a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that names the field or file, what is wrong and the cure. The command line exits with 2."""
