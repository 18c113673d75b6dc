"""`epd config`: what the settings are, where each comes from, and whether a file is sound."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from epd.roles import parse_topology
from epd_services.cli.terminal import print_json, show_table, table, usage_error
from epd_services.settings import Settings, load_settings

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["redacted", "show", "validate"]

_PASSWORD = re.compile(r"(://[^/@\s]*?:)[^@\s]*@")


def redacted(value: Any) -> Any:
    """The value as it may be shown: a password inside a URL is starred out."""
    return _PASSWORD.sub(r"\1***@", value) if isinstance(value, str) else value


def show(config: Path | None, *, as_json: bool) -> None:
    """Print every setting with its value and origin."""
    settings, origin = load_settings(config)
    values = {name: redacted(v) for name, v in settings.model_dump(mode="json").items()}
    if as_json:
        print_json({name: {"value": v, "origin": origin[name]} for name, v in values.items()})
        return
    rows = [
        (name, "" if value is None else str(value), origin[name], _about(name))
        for name, value in values.items()
    ]
    show_table(table("", ("setting", "value", "from", "about"), rows))


def _about(name: str) -> str:
    return Settings.model_fields[name].description or ""


def validate(file: Path, *, as_json: bool) -> None:
    """Say that `file` is sound; raises `ConfigError` when it is not."""
    if not file.is_file():
        raise usage_error(
            f"Cannot validate {file}.", "There is no such file.", "epd config validate FILE.toml"
        )
    settings, origin = load_settings(file)
    parse_topology(settings.topology)
    settings.wire_key()
    named = sorted(name for name, source in origin.items() if source == "file")
    if as_json:
        print_json({"valid": True, "sets": named})
    else:
        print(f"{file} is sound and sets {', '.join(named) or 'nothing'}.")
