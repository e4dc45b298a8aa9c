"""Settings from flags, environment and file, in this order: what stands nearer to the person at the keyboard wins.

--kv-memory 2GiB   >   POLYPHASE_KV_MEMORY=2GiB   >   kv_memory = "2GiB" in the file of --config   >   default

In the file, a table may group settings: `weights = …` under `[router]` is `router_weights`; `settings.SECTIONS` says which.
Each table under `[[groups]]` is a group of workers.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from polyphase.config.settings import SECTIONS, GroupSettings, ServeSettings
from polyphase.core.errors import ConfigurationError

ENVIRONMENT_PREFIX = "POLYPHASE_"
_ROLE_FIELDS = ("workers", "prefill", "decode")
_OF_ONE_GROUP = (*_ROLE_FIELDS, "model", "served_model_name", "aliases", "lora", "group", "weight", "attach")

Settings = TypeVar("Settings", bound=BaseModel)


def load_serve_settings(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None = None) -> ServeSettings:
    """`flags` by field name; None is a flag that was not given.

    Raises: ConfigurationError, naming the flag, variable or line in the file that is wrong, and what would be right.
    """
    in_file, tables = _Values(), list[_Values]()
    if file is not None:
        in_file, tables = _read_toml(file)
    variables = {field: ENVIRONMENT_PREFIX + field.upper() for field in ServeSettings.model_fields if field != "groups"}
    nearer = _Values()
    nearer.take({field: environment[name] for field, name in variables.items() if environment.get(name)}, variables)
    given = {field: value for field, value in flags.items() if value is not None}
    nearer.take(given, {field: "MODEL" if field == "model" else "--" + field.replace("_", "-") for field in given})
    if not tables:
        values = in_file.with_nearer(nearer)
        if "model" not in values.by_field:
            raise ConfigurationError("no model is named; write for example: polyphase serve demo")
        return _with_keys(_validated(ServeSettings, values), environment)
    for name in _OF_ONE_GROUP:
        if name in nearer.by_field:
            raise ConfigurationError(
                f"{nearer.names[name]} is for one group of workers, and {file} has groups of its own; write it there, under [[groups]]"
            )
    groups = tuple(_validated(GroupSettings, _group_values(in_file, table, nearer, file)) for table in tables)
    values = in_file.with_nearer(nearer)
    for name in GroupSettings.model_fields:
        values.by_field.pop(name, None)
    values.by_field |= {"model": groups[0].model, "groups": groups}
    return _with_keys(_validated(ServeSettings, values), environment)


def _with_keys(settings: ServeSettings, environment: Mapping[str, str]) -> ServeSettings:
    """Raises: ConfigurationError if an API key is not where it is said to be.

    What was written in place of a variable's name may be the key itself: it is not repeated, and goes to no command line.
    """
    for group in settings.worker_groups:
        if group.engine_api_key_env is not None and not environment.get(group.engine_api_key_env, "").strip():
            raise ConfigurationError(
                "--engine-api-key-env names an environment variable that is not set; put the engine's API key into one, "
                "for example OPENAI_API_KEY, and write its name, never the key"
            )
    return settings


@dataclass(slots=True)
class _Values:
    """What was given, by field, and what whoever gave it calls each field."""

    by_field: dict[str, object] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def take(self, given: Mapping[str, object], names: Mapping[str, str]) -> None:
        """In place of what was there."""
        if any(role in given for role in _ROLE_FIELDS):  # these belong together: a nearer choice replaces a farther one whole
            for role in _ROLE_FIELDS:
                self.by_field.pop(role, None)
        self.by_field.update(given)
        self.names.update({field: names[field] for field in given})

    def with_nearer(self, *nearer: _Values) -> _Values:
        values = _Values(dict(self.by_field), dict(self.names))
        for one in nearer:
            values.take(one.by_field, one.names)
        return values


def _group_values(in_file: _Values, table: _Values, nearer: _Values, file: Path | None) -> _Values:
    """What stands outside of the groups holds for those that do not say otherwise; flags and variables hold for all."""
    values = in_file.with_nearer(table, nearer)
    values.by_field = {field: value for field, value in values.by_field.items() if field in GroupSettings.model_fields}
    if "model" not in values.by_field:
        raise ConfigurationError(f'a group in {file} names no model; write for example model = "demo" into it')
    return values


def _validated(kind: type[Settings], values: _Values) -> Settings:
    try:
        return kind.model_validate(values.by_field)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error.errors()[0], values.names)) from None


def _read_toml(file: Path) -> tuple[_Values, list[_Values]]:
    """What the file says, and what each of its groups does; both call fields by their place in the file."""
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is not valid TOML: {error}") from None
    tables = content.pop("groups", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"groups in {file} is {tables!r}; write each group as a table of its own, [[groups]]")
    values = _Values()
    for section, known in SECTIONS.items():
        table = content.pop(section, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{section} in {file} is {table!r}; write it as a table, [{section}]")
        _take_table(values, table, known, f"{section}.", file)
    _take_table(values, content, _by_own_name(ServeSettings), "", file)
    groups = []
    for number, table in enumerate(tables):
        groups.append(_Values())
        _take_table(groups[-1], table, _by_own_name(GroupSettings), f"groups[{number}].", file)
    return values, groups


def _by_own_name(kind: type[BaseModel]) -> Mapping[str, str]:
    return {name: name for name in kind.model_fields}


def _take_table(values: _Values, table: Mapping[str, object], known: Mapping[str, str], prefix: str, file: Path) -> None:
    for key, value in table.items():
        name = known.get(key.replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigurationError(f"{file} sets '{prefix}{key}', which is not a setting; {hint}")
        if name in values.by_field:
            before = values.names[name].removesuffix(f" in {file}")
            raise ConfigurationError(f"{file} sets both {before} and {prefix}{key}, which are the same; leave one out")
        values.by_field[name], values.names[name] = value, f"{prefix}{key} in {file}"


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
