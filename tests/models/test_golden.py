"""Golden files: what every family's config.json is read as, so that no change of it goes unseen.

`tests/golden/tiny/FAMILY.json` is a small config.json without "architectures"; `tests/golden/FAMILY.json` is what each
architecture of the family makes of it: the config tree and the shapes of the parameters. To add a family, or to accept
a change, write the tiny file, run

    LANDMARK_GOLDEN=write python -m pytest tests/models/test_golden.py

and read the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from landmark.config import flatten, from_dict, to_dict
from landmark.models.registry import families
from landmark.weights.checkpoint import read_config

GOLDEN = Path(__file__).parents[1] / "golden"
HOW = "; LANDMARK_GOLDEN=write python -m pytest tests/models/test_golden.py writes it"
FAMILIES: dict[str, list[str]] = {}  # name -> architectures
for architecture, family in sorted(families().items()):
    FAMILIES.setdefault(family.name, []).append(architecture)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def made(name: str) -> dict[str, Any]:
    """Config tree and parameter shapes of every architecture of a family, from its tiny config.json."""
    path = GOLDEN / "tiny" / f"{name}.json"
    assert path.exists(), f"the family {name} has no tests/golden/tiny/{name}.json: write a small config.json"
    tiny, out = read(path), {}
    for architecture in FAMILIES[name]:
        config, _ = read_config({"architectures": [architecture], **tiny})
        assert from_dict(to_dict(config)) == config, "a config tree is data that reads back"
        with torch.device("meta"):
            weights = config.build().state_dict()
        shapes = {key: " x ".join(map(str, weight.shape)) for key, weight in weights.items()}
        out[architecture] = {"config": to_dict(config), "parameters": shapes}
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_golden(name: str) -> None:
    path, have = GOLDEN / f"{name}.json", made(name)
    if os.environ.get("LANDMARK_GOLDEN") == "write":
        path.write_text(json.dumps(have, indent=1) + "\n", encoding="utf-8")
    assert path.exists(), f"{path.relative_to(GOLDEN.parents[1])} is missing{HOW}"
    before, after = (
        {f"{a}.{part}.{key}": value for a in x for part in x[a] for key, value in flatten(x[a][part]).items()}
        for x in (read(path), json.loads(json.dumps(have)))
    )
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    assert not changed, f"not as {path.name} has it{HOW}:\n" + "\n".join(changed)


def test_no_file_is_left_over() -> None:
    stale = [str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.json") if path.stem not in FAMILIES]
    assert not stale, f"nothing is called so: {stale}"
