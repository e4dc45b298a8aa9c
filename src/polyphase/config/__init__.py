"""Turns what people write (flags, environment variables, a TOML file) into checked settings, or into one sentence that says what is wrong.

Read by the composition roots only: the command line and the launcher. Everything below them is given plain frozen values.
"""

from polyphase.config.load import ENVIRONMENT_PREFIX, load_serve_settings
from polyphase.config.settings import DeploymentSettings, GroupSettings, ServeSettings
from polyphase.config.units import format_bytes, parse_duration_s, parse_size_bytes

__all__ = [
    "ENVIRONMENT_PREFIX",
    "DeploymentSettings",
    "GroupSettings",
    "ServeSettings",
    "format_bytes",
    "load_serve_settings",
    "parse_duration_s",
    "parse_size_bytes",
]
