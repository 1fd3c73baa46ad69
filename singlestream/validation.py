"""What pydantic refuses, in one line that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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
