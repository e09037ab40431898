"""The papers that Landmark is about: the catalogue (`catalogue.toml`, read by `catalogue.py`)."""

from __future__ import annotations
