"""The shape of the house: imports run downward, the package starts quickly, and nothing forbidden is imported."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import landmark

ROOT = Path(landmark.__file__).parent
FLOORS = [  # a module may import from its own floor and from those below
    {"config", "ctx", "malloc", "terminal"},
    {"ops"},
    {"nn"},
    {"models", "weights", "data"},
    {"objectives", "transforms", "parallel"},
    {"infer", "train"},
    {"serve", "evals", "safety", "interp"},
    {"papers", "quickstart"},
    {"cli", "__init__", "__main__"},
]
FORBIDDEN = {"transformers", "trl", "peft", "diffusers", "torchvision", "pickle"}


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> list[str]:
    """Absolute names of what a file imports."""
    package = ("landmark", *path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            found += [f"{base}.{node.module}.{a.name}" if node.module else f"{base}.{a.name}" for a in node.names]
    return found


def test_imports_run_downward() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "landmark"
                and len(parts) > 1
                and parts[1] != "__version__"
                and floor(parts[1]) > floor(here)
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[0] in FORBIDDEN:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}, which is not to be imported")
    assert not wrong, "\n".join(wrong)


def cost(code: str) -> float:
    """Processor seconds of a fresh interpreter, the least of three: its time on a machine that does nothing else."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def test_import_adds_little_to_torch() -> None:
    ours = cost("import landmark; landmark.load, landmark.save, landmark.train")
    assert ours - cost("import torch") < 1.5


def test_help_is_quick_and_needs_no_torch() -> None:
    quick = "import sys; sys.argv = ['landmark', '--help']; from landmark.cli.main import main\n"
    assert cost(quick + "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules") < 0.5


def test_no_compiler_is_loaded_that_nobody_asked_for() -> None:
    """It takes a second and 60 MB."""
    code = """
import sys, torch
from landmark.models.pattern import FFNS, MIXERS, pattern
from landmark.transforms.quantise import quantised

tokens = torch.zeros(1, 130, dtype=torch.long)
for part in [*MIXERS, *(f"attention/{name}" for name in FFNS)]:
    model = pattern(f"1*{part}", dim=64, vocab=50).build()
    model.loss(model.hidden(tokens), tokens).loss.backward()
    with torch.inference_mode():
        model.eval()(tokens)
    assert "torch._dynamo" not in sys.modules, part
with torch.inference_mode():
    for way in ("int4", "int8-a8"):
        quantised(pattern("1*attention", dim=64, vocab=50).build().eval(), way)(tokens)
assert "torch._dynamo" not in sys.modules, "codes"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
