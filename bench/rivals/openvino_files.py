"""GGUF files as OpenVINO GenAI reads them, written in OpenVINO's own form: `openvino_files.py GGUFS OUT FORMAT...`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import openvino_genai

PARTS = ("openvino_model.xml", "openvino_model.bin")


def convert(gguf: Path, out: Path) -> None:
    """GenAI writes what it read beside the file, then wants a tokenizer, of which random weights have none."""
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        link = Path(name) / gguf.name
        link.symlink_to(gguf.resolve())
        try:
            openvino_genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        except (IndexError, RuntimeError):
            if not all((link.parent / part).exists() for part in PARTS):
                raise
        ready = link.parent / "ready"
        ready.mkdir()
        for part in PARTS:
            (link.parent / part).rename(ready / part)
        ready.rename(out)


def main() -> None:
    gguf, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    for name in sys.argv[3:]:
        if not (out / name).exists():
            convert(gguf / f"{name}.gguf", out / name)


if __name__ == "__main__":
    main()
