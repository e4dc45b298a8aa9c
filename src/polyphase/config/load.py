"""Settings from flags, environment and file, in this order: what stands nearer to the person at the keyboard wins.

--kv-memory 2GiB   >   POLYPHASE_KV_MEMORY=2GiB   >   kv_memory = "2GiB" in the file of --config   >   default

In the file, a table may group settings: `weights = …` under `[router]` is `router_weights`; `settings.SECTIONS` says which.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from polyphase.config.settings import SECTIONS, ServeSettings
from polyphase.core.errors import ConfigurationError

ENVIRONMENT_PREFIX = "POLYPHASE_"
_ROLE_FIELDS = ("workers", "prefill", "decode")


def load_serve_settings(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None = None) -> ServeSettings:
    """`flags` by field name; None is a flag that was not given.

    Raises: ConfigurationError, naming the flag, variable or line in the file that is wrong, and what would be right.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}

    def take(given: Mapping[str, object], source: Mapping[str, str]) -> None:
        if any(field in given for field in _ROLE_FIELDS):  # these belong together: a nearer choice replaces a farther one whole
            for field in _ROLE_FIELDS:
                values.pop(field, None)
        values.update(given)
        sources.update(source)

    if file is not None:
        content, names = _read_toml(file)
        take(content, {field: f"{names[field]} in {file}" for field in content})
    variables = {field: ENVIRONMENT_PREFIX + field.upper() for field in ServeSettings.model_fields}
    from_environment = {field: environment[name] for field, name in variables.items() if environment.get(name)}
    take(from_environment, {field: variables[field] for field in from_environment})
    given = {field: value for field, value in flags.items() if value is not None}
    take(given, {field: "MODEL" if field == "model" else "--" + field.replace("_", "-") for field in given})
    if "model" not in values:
        raise ConfigurationError("no model is named; write for example: polyphase serve demo")
    try:
        settings = ServeSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error.errors()[0], sources)) from None
    if settings.engine_api_key_env is not None and not environment.get(settings.engine_api_key_env, "").strip():
        # What was written there may be the key itself: it is not repeated, and goes to no command line.
        raise ConfigurationError(
            f"{sources['engine_api_key_env']} names an environment variable that is not set; put the engine's API key into one, "
            "for example OPENAI_API_KEY, and write its name, never the key"
        )
    return settings


def _read_toml(file: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Values by field, and what the file calls each."""
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is not valid TOML: {error}") from None
    fields = dict(zip(ServeSettings.model_fields, ServeSettings.model_fields, strict=True))
    settings: dict[str, object] = {}
    names: dict[str, str] = {}

    def take(entries: Mapping[str, object], known: Mapping[str, str], prefix: str) -> None:
        for key, value in entries.items():
            field = known.get(key.replace("-", "_"))
            if field is None:
                near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
                raise ConfigurationError(f"{file} sets '{prefix}{key}', which is not a setting; {hint}")
            if field in settings:
                raise ConfigurationError(f"{file} sets both {names[field]} and {prefix}{key}, which are the same; leave one out")
            settings[field], names[field] = value, f"{prefix}{key}"

    for section, known in SECTIONS.items():
        table = content.pop(section, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{section} in {file} is {table!r}; write it as a table, [{section}]")
        take(table, known, f"{section}.")
    take(content, fields, "")
    return settings, names


def _sentence(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    field = str(error["loc"][0])
    message = message.removeprefix("Input ")
    where = sources.get(field, field)
    if message.startswith(("'", '"', "there")):  # a sentence of its own, which quotes the value
        return f"{where}: {message}"
    return f"{where} {error['input']!r} {message}"
