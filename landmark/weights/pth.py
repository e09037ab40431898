"""Weights that their authors published as .pth: read without running anything, and written as a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError

from ..config import nearest
from ..models.base import Model, Origin
from ..models.registry import Keys, family_of
from ..models.rwkv import authors_rules4
from .checkpoint import as_dtype, check_weights, save
from .files import new_directory
from .rules import load as apply_rules


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, mapped from disk. Whatever is in it, nothing of it is executed.

    Raises ValueError for a file that holds anything but tensors by name, and for one that is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a .pth file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds more than weights, which could run anything; it is not opened") from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no .pth file, or is cut short ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} holds no table of tensors by name; take the weights out of it first")
    return {str(name): tensor for name, tensor in found.items()}


def convert(path: str | Path, directory: str | Path, *, dtype: torch.dtype | str | None = None) -> Model:
    """Write a model directory for an RWKV-4, 5, 6 or 7 file of the authors; the model, in eval mode.

    What its config.json says is found in the shapes of the tensors. `dtype` None keeps what is stored.
    """
    path, weights = Path(path), read_pth(Path(path))
    hf = config_of_rwkv(weights, path)
    family = family_of(hf)
    keys = Keys(hf)
    ours = apply_rules(authors_rules4(keys) if family.name == "rwkv" else family.rules(keys), weights)
    with torch.device("meta"):
        model = family.read(hf).build()
    assert isinstance(model, Model)
    check_weights(model, ours, path)
    kind = None if dtype is None else as_dtype(dtype)
    model.load_state_dict({name: t.to(kind or t.dtype).contiguous() for name, t in ours.items()}, assign=True)
    model.requires_grad_(True).eval()
    model.origin = Origin(hf)
    with new_directory(Path(directory)) as fresh:
        save(model, fresh)
    return model


def config_of_rwkv(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The config.json of an RWKV file of the authors, from the names and shapes of its tensors.

    Raises ValueError for files of other models, and for previews of RWKV-5 whose decays are one number a head.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"{path} has no tensor {name!r}{nearest(name, weights)}; only RWKV files are converted")
        return tuple(weights[name].shape)

    vocab, dim = shape("emb.weight")
    layers = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    att = "blocks.0.att."
    hf: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": layers,
        "intermediate_size": shape("blocks.0.ffn.key.weight")[0],
    }  # fmt: skip
    if att + "r_k" in weights:
        ranks = {"decay_rank": "w1", "rate_rank": "a1", "gate_rank": "g1"}
        hf |= {name: shape(att + theirs)[1] for name, theirs in ranks.items()}
        if layers > 1 or att + "v1" in weights:
            hf["value_rank"] = shape(f"blocks.{layers - 1}.att.v1")[1]
        hf |= {"head_size": shape(att + "r_k")[1], "first_value_map": att + "v1" in weights}
        return {"architectures": ["RWKV-x070"], "model_type": "rwkv7", **hf}
    if att + "time_maa_x" in weights:
        hf |= {"mix_rank": shape(att + "time_maa_w2")[1], "decay_rank": shape(att + "time_decay_w1")[1]}
        return {
            "architectures": ["RWKV-x060"], "model_type": "rwkv6", **hf, "head_size": shape(att + "time_faaaa")[1],
        }  # fmt: skip
    if att + "ln_x.weight" in weights:
        decay = shape(att + "time_decay")
        if len(decay) != 2 or decay[1] == 1 or att + "gate.weight" not in weights:
            raise ValueError(f"{path} is a preview of RWKV-5 (decays {list(decay)}); take a file of version 5.2")
        return {"architectures": ["RWKV-x052"], "model_type": "rwkv5", **hf, "head_size": decay[1]}
    hf |= {"attention_hidden_size": shape(att + "key.weight")[0], "rescale_every": 6, "tie_word_embeddings": False}
    return {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv", **hf}
