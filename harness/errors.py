"""The two kinds of failure a user can act on."""


class ConfigError(Exception):
    """What was asked for cannot be: a wrong name, value or combination.

    Raised before weights load. The message names the value, the bound and the way out. Exit status 2.
    """


class RunError(Exception):
    """A valid run could not be finished on this machine: a missing file, a wrong hash, no memory, no disk.

    The message says what happened and what to do about it. Exit status 1.
    """
