"""Whether a file belongs to what is asked for now: cached and resumed work is never taken on trust."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightrope.errors import IdentityError


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse to go on from something that was made differently.

    Raises:
        IdentityError: naming each difference.
    """
    differences = [
        f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise IdentityError(
            f"{where} was made with other settings:\n" + "\n".join(differences) + "\n"
            "Resume with the same settings, or start afresh in another place."
        )
