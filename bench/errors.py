"""The one exception that means: the user can cure this."""


class BenchError(Exception):
    """A mistake in a config, a file or a command; the message names the file, the key, the cure."""
