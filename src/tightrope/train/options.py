"""The options of methods and modifiers: derived from their functions' signatures, and checked."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tightrope.errors import InputError
from tightrope.train.schedules import Ramp, Steps, completed

SCHEDULE_KEYS = {**Ramp.model_fields, **Steps.model_fields}


@cache
def options_of(function: Callable[..., Any]) -> type[BaseModel]:
    """The options of a method or modifier as a pydantic model, derived from its function's signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return create_model(
        f"{function.__name__} options", __config__=ConfigDict(extra="forbid", frozen=True), **fields
    )


def check_options(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All options of a method or modifier, read ("8/255") and with its defaults.

    Args:
        function: the method or modifier.
        options: what is said.
        name: how errors call it.

    Raises:
        InputError: naming every unknown key, with the nearest valid one, and every bad value.
    """
    model = options_of(function)
    options = dict(options)
    for key in options.keys() & model.model_fields.keys():
        try:
            options[key] = completed(options[key], model.model_fields[key].default)
        except ValueError as error:
            raise InputError(f"{name} cannot be used:\n  {key}: {error}") from None
    try:
        checked = model.model_validate(options)
    except ValidationError as error:
        keys = {key: key for key in (*SCHEDULE_KEYS, *model.model_fields)}
        raise InputError(explain(error, name, keys)) from None
    return {key: getattr(checked, key) for key in model.model_fields}


def explain(error: ValidationError, source: str, known: Mapping[str, str]) -> str:
    """What is wrong with each key and value, in a line each, or in one line if it is one.

    Args:
        error: what pydantic says.
        source: what cannot be used.
        known: the valid keys, and how to call each one.
    """
    lines = []
    for problem in error.errors():
        # In angle brackets is the form of a number (see `Number`), which is no key.
        place = ".".join(part for part in map(str, problem["loc"]) if not part.startswith("<"))
        if problem["type"] == "extra_forbidden":
            *table, word = map(str, problem["loc"])
            beside = {key: name for key, name in known.items() if name.split(".")[:-1] == table}
            lines.append(f"  unknown key {place}{nearest(word, beside) or nearest(word, known)}")
        elif problem["type"] == "missing":
            lines.append(f"  {place} is missing")
        elif problem["type"] == "value_error":
            lines.append(f"  {place}: {problem['ctx']['error']}")
        else:
            lines.append(f"  {place}: {problem['msg']} (got {problem['input']!r})")
    if len(lines) == 1:
        return f"{source} cannot be used: {lines[0].strip()}"
    return f"{source} cannot be used:\n" + "\n".join(lines)


def nearest(word: str, known: Mapping[str, str]) -> str:
    """A hint at the valid key that was meant, in brackets; "" if none is near."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {known[match[0]]!r}?)" if match else ""
