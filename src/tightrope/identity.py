"""Whether a file belongs to what is asked for now: cached and resumed work is never taken on trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tightrope.errors import IdentityError


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse to go on from something that was made differently.

    Raises:
        IdentityError: naming each difference.
    """
    differences = [
        f"  {key}: {_shown(found.get(key))} there, {_shown(wanted.get(key))} now"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise IdentityError(
            f"{where} was made with other settings:\n" + "\n".join(differences) + "\n"
            "Resume with the same settings, or start afresh in another place."
        )


def _shown(value: Any) -> str:
    """A value, or enough of a hash to tell it from another."""
    if value is None:
        return "none"
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"one with the hash {value[:8]}" if is_hash else repr(value)
