"""Refusing settings that mean nothing, before anything is computed with them."""

from collections.abc import Mapping

Checks = dict[str, tuple[bool, str]]
"""By the name of a field: whether it is right, and what it must be."""


def refuse(settings: object, checks: Checks, prefix: str = "") -> None:
    """Refuse a setting that is wrong, by its flag, its value and what it must be.

    Args:
        settings: Whose fields are checked.
        checks: The first one that is wrong is told.
        prefix: Of the flags, such as "finetune.".

    Raises:
        ValueError: If one is wrong.
    """
    for name, (ok, expected) in checks.items():
        if not ok:
            flag = f"--{prefix}{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {getattr(settings, name)}: it must be {expected}")


def at_least(settings: object, least: Mapping[str, float]) -> Checks:
    """Checks for `refuse` of fields that have a least value, or are None."""
    values = {name: getattr(settings, name) for name in least}
    return {
        name: (values[name] is None or values[name] >= lowest, f"at least {lowest}") for name, lowest in least.items()
    }
