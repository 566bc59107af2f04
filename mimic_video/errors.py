"""The error of a user who configures."""


class ConfigError(ValueError):
    """A configuration value that cannot be used. The message names the field, the value and what was expected."""
