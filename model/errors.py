"""Errors that are the user's to fix. The command line prints them as one line and exits with status 2."""


class UserError(Exception):
    """What was expected, what came, how to fix it: one line."""


class CheckpointError(UserError):
    """A checkpoint directory that cannot be read, is incomplete, or holds a model that is not supported."""
