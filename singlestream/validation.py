"""What pydantic refuses, in one line that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Every refused field with the reason; for an unknown one the known name that is nearest.

    Args:
        error: of validating ``model``.
        model: where the names come from.
    """
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'together'}: {_reason(one['loc'], one['type'], one['msg'], model)}"
        for one in error.errors(include_url=False, include_input=False)
    )


def misnamed_variables(names: Iterable[str], prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """Variables that are meant as settings and would be ignored, each with what is meant.

    Those are ``<prefix><section>__<key>`` with a section that is nearly one, and ``<prefix><section>_<key>`` of one
    that there is; others with the prefix are somebody else's. Pydantic refuses keys that a section does not have.

    Args:
        names: of the environment's variables.
        prefix: of those that are settings, in capitals.
        model: its fields are the sections.
    """
    sections = model.model_fields
    meant = {f"{section}_{key}": (section, key) for section in sections for key in _names((section,), model)}
    for name in sorted(name for name in names if name.upper().startswith(prefix)):
        setting = name[len(prefix) :].lower()
        section, is_nested, key = setting.partition("__")
        if setting in meant:
            section, key = meant[setting]
        elif is_nested and section not in sections and (near := difflib.get_close_matches(section, sections, n=1)):
            section = near[0]
        else:
            continue
        yield f"{name}: no such setting; do you mean {prefix}{section.upper()}__{key.upper()}?"


def _reason(place: tuple[int | str, ...], kind: str, message: str, model: type[BaseModel]) -> str:
    if kind == "missing":
        return "is missing"
    if kind != "extra_forbidden":
        return message[0].lower() + message[1:]
    near = difflib.get_close_matches(str(place[-1]), _names(place[:-1], model), n=1)
    return "no such setting" + (f"; do you mean {near[0]}?" if near else "")


def _names(place: Iterable[int | str], model: Any) -> Iterable[str]:
    """Fields of the model that stands at a place within another."""
    for part in place:
        model = model.model_fields[part].annotation
    return model.model_fields.keys()  # type: ignore[no-any-return]
