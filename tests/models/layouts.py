"""config.json as older files wrote it."""

from __future__ import annotations


def old_rope(hf: dict) -> dict:
    """`rope_theta` and `rope_scaling` for `rope_parameters`."""
    values = dict(hf.pop("rope_parameters"))
    hf["rope_theta"] = values.pop("rope_theta")
    kind = values.pop("rope_type")
    return hf | {"rope_scaling": None if kind == "default" else {"type": kind, **values}}


def without(*names: str):  # type: ignore[no-untyped-def]
    """An edit that takes keys out."""
    return lambda hf: {key: value for key, value in hf.items() if key not in names}
