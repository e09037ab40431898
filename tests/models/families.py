"""The one test that every decoder family passes: against a tiny random reference, with all parameters perturbed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import landmark
from landmark.models.decoder import Decoder
from landmark.weights.files import read_tensors

TOLERANCE = 2e-5  # of the largest logit, in float32


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter away from its initial value, so that none can be missing unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * (0.2 if p.dim() < 2 else 0.08)


def reference(config: Any, cls: Any, directory: Path) -> torch.nn.Module:
    """A tiny random reference model, perturbed, saved to `directory`."""
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    perturb(model)
    model.save_pretrained(directory)
    return model


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} for numbers up to {scale:.2f}"


def check_decoder(
    config: Any, cls: Any, directory: Path, *, length: int = 23, edit: Callable[[dict], dict] | None = None,
    decode: bool = True, tolerance: float = TOLERANCE,
) -> Decoder:  # fmt: skip
    """Parity, exact weight round trip, decode == forward, packed == alone, ragged batch == alone."""
    theirs = reference(config, cls, directory)
    if edit is not None:
        path = directory / "config.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    model = landmark.load(directory)
    assert isinstance(model, Decoder)
    vocab = model.cfg.embed.vocab
    tokens = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens)
        close(full, theirs(tokens, use_cache=False).logits, tolerance)
        check_round_trip(model, directory)
        check_packing(model, tokens)
        if decode:
            check_decoding(model, tokens, full)
    return model


def check_round_trip(model: Any, directory: Path) -> None:
    back = directory / "back"
    landmark.save(model, back)
    before, after = read_tensors(directory), read_tensors(back)
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype, name
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (back, directory))
    assert {k: v for k, v in ours.items() if k != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}


def check_packing(model: Decoder, tokens: Tensor) -> None:
    """Two documents in a row equal each alone; so do documents and padding spread over two rows."""
    length = tokens.shape[1]
    cut = length * 2 // 3
    a, b, c = tokens[:1, :cut], tokens[:1, cut:], tokens[1:, : length - 3]
    segments = torch.ones_like(tokens)
    segments[0, cut:] = 2
    segments[1, -3:] = 0
    packed = model(tokens, segments=segments)
    close(packed[:1, :cut], model(a))
    close(packed[:1, cut:], model(b))
    close(packed[1:, : length - 3], model(c))


def check_decoding(model: Decoder, tokens: Tensor, full: Tensor) -> None:
    """Step by step, chunk by chunk, and ragged, all equal to the full forward."""
    length = tokens.shape[1]
    state = model.new_state(2, capacity=length)
    steps = [model(tokens[:, :5], state=state), model(tokens[:, 5:9], state=state)]
    steps += [model(tokens[:, t : t + 1], state=state) for t in range(9, length)]
    close(torch.cat(steps, 1), full)
    check_ragged_decoding(model, tokens, full)


def check_ragged_decoding(model: Decoder, tokens: Tensor, full: Tensor) -> None:
    """Prompts of different lengths, prefilled in one row, then decoded side by side."""
    from landmark.ctx import Bounds

    state = model.new_state(2, capacity=tokens.shape[1])
    lengths = (tokens.shape[1] - 6, 4)
    flat = torch.cat([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    out = model(flat, bounds=Bounds.of_lengths(lengths), state=state)
    close(out[0, : lengths[0]], full[0, : lengths[0]])
    close(out[0, lengths[0] :], full[1, : lengths[1]])
    for step in range(4):
        at = [n + step for n in lengths]
        new = torch.stack([tokens[i, t] for i, t in enumerate(at)])[:, None]
        out = model(new, state=state)
        for i, t in enumerate(at):
            close(out[i, 0], full[i, t])
    snapshot = state.snapshot()
    again = [model(tokens[:, :1], state=state) for _ in range(2)]
    state.restore(snapshot)
    close(model(tokens[:, :1], state=state), again[0])
    state.select([1, 1, 0])
    close(model(tokens[[1, 1, 0], :1], state=state), again[1][[1, 1, 0]])


def with_prefix_removed(directory: Path, prefix: str) -> None:
    """Rewrite a checkpoint as files that were saved without their head."""
    path = directory / "model.safetensors"
    weights = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    save_file(weights, path, metadata={"format": "pt"})
