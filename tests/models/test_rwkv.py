"""RWKV-4 beside transformers; RWKV-4 to 7 beside the authors' package, from .pth files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM
from typer.testing import CliRunner

import landmark
from landmark.cli.convert import convert as command
from landmark.cli.main import app
from landmark.models.decoder import Decoder
from landmark.models.inspect import count, figures, state_bytes
from landmark.models.registry import Keys, family_of, published
from landmark.models.rwkv import authors_rules4
from landmark.weights.files import read_tensors
from landmark.weights.pth import config_of_rwkv, convert, read_pth
from landmark.weights.rules import unload

from .families import check_decoder, check_decoding, check_packing, check_round_trip, close, perturb, reference

BASE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "4": {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv", "attention_hidden_size": 32},
    "5": {"architectures": ["RWKV-x052"], "model_type": "rwkv5", "head_size": 16},
    "6": {"architectures": ["RWKV-x060"], "model_type": "rwkv6", "head_size": 16, "mix_rank": 5, "decay_rank": 6},
    "7": {"architectures": ["RWKV-x070"], "model_type": "rwkv7", "head_size": 16},
    "7, as trained": {"architectures": ["RWKV-x070"], "model_type": "rwkv7", "head_size": 8, "first_value_map": True},
}
RANKS = {"decay_rank": 4, "rate_rank": 5, "value_rank": 6, "gate_rank": 7}
CONFIGS["7"] |= RANKS
CONFIGS["7, as trained"] |= RANKS
TOKENS = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inner", [32, 48])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers(tied: bool, inner: int, tmp_path: Path) -> None:
    config = RwkvConfig(**BASE, attention_hidden_size=inner, context_length=64, tie_word_embeddings=tied)
    if inner != 32:  # its state is as wide as the stream
        theirs = reference(config, RwkvForCausalLM, tmp_path)
        model = landmark.load(tmp_path)
        with torch.no_grad():
            close(model(TOKENS), theirs(TOKENS, use_cache=False).logits)
            check_round_trip(model, tmp_path)
        return
    check_decoder(config, RwkvForCausalLM, tmp_path)


def test_rescaling_is_of_no_effect(tmp_path: Path) -> None:
    """transformers halves the stream every so many layers in eval mode, for half precision: we compute what it trains,
    and it evaluates, but for what the norms add to the variance."""
    config = RwkvConfig(**BASE, attention_hidden_size=32, context_length=64, rescale_every=1)
    theirs = reference(config, RwkvForCausalLM, tmp_path)
    model = landmark.load(tmp_path)
    with torch.no_grad():
        close(model(TOKENS), theirs.train()(TOKENS, use_cache=False).logits)
        close(model(TOKENS), theirs.eval()(TOKENS, use_cache=False).logits, 1e-3)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the authors' package reads from the environment."""
    for key in ("RWKV_JIT_ON", "RWKV_CUDA_ON", "RWKV_V7_ON"):
        monkeypatch.setenv(key, "0")
    yield


@cache
def package(goose: bool) -> ModuleType:
    """The authors' inference package, which is one model or the other by what the environment says at its import."""
    spec = importlib.util.find_spec("rwkv")
    assert spec is not None and spec.submodule_search_locations is not None
    name = f"rwkv_model_{goose}"
    path = Path(spec.submodule_search_locations[0]) / "model.py"
    made = importlib.util.spec_from_file_location(name, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_V7_ON", "1" if goose else "0")
        made.loader.exec_module(module)
    return module


def authors(file: Path, goose: bool) -> Any:
    return package(goose).RWKV(model=str(file.with_suffix("")), strategy="cpu fp32")


def write_pth(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random file under the authors' names and shapes."""
    torch.manual_seed(0)
    hf = {**BASE, **CONFIGS[kind]}
    model = landmark.build(hf)
    perturb(model)
    rules = authors_rules4(Keys(hf)) if kind == "4" else family_of(hf).rules(Keys(hf))
    weights = {name: t.detach().to(dtype).contiguous() for name, t in unload(rules, model.state_dict()).items()}
    torch.save(weights, path)
    return weights


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_authors_files(kind: str, tmp_path: Path) -> None:
    """A .pth file becomes a directory that computes what the authors' package computes, and holds the same numbers."""
    file, out = tmp_path / "model.pth", tmp_path / "out"
    weights = write_pth(kind, file)
    converted = convert(file, out)
    model = landmark.load(out)
    assert isinstance(model, Decoder) and model.cfg == converted.cfg
    told = json.loads((out / "config.json").read_text())
    assert {k: told[k] for k in {**BASE, **CONFIGS[kind]}} == {**BASE, **CONFIGS[kind]}
    stored = read_tensors(out)
    if kind != "4":
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[name], t) for name, t in weights.items())
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in weights.values()) == count(model)
    check_round_trip(model, out)
    theirs = authors(file, kind.startswith("7"))
    full = model(TOKENS)
    for row, tokens in zip(full, TOKENS.tolist(), strict=True):
        close(row, theirs.forward(tokens, None, full_output=True)[0])
    state, memory = None, model.new_state(1, 30)
    for token in TOKENS[0].tolist():
        want, state = theirs.forward([token], state)
        close(model(torch.tensor([[token]]), state=memory)[0, 0], want)
    check_packing(model, TOKENS)
    check_decoding(model, TOKENS, full)
    wide = state_bytes(model, torch.float32, 10, 100_000)
    assert wide[0] == wide[1] == sum(t.numel() * 4 for t in _state_of(theirs.forward([1], None)[1]))


def _state_of(state: Any) -> list[Tensor]:
    return [t for t in state if isinstance(t, Tensor)]


@torch.no_grad()
def test_bfloat16_files(tmp_path: Path) -> None:
    """As the authors publish them; kept to the bit, or widened."""
    weights = write_pth("7", tmp_path / "model.pth", torch.bfloat16)
    convert(tmp_path / "model.pth", tmp_path / "out")
    stored = read_tensors(tmp_path / "out")
    assert all(torch.equal(stored[name], t) and stored[name].dtype == torch.bfloat16 for name, t in weights.items())
    wide = convert(tmp_path / "model.pth", tmp_path / "wide", dtype="float32")
    near = landmark.load(tmp_path / "out")(TOKENS).float()
    assert near.isfinite().all() and (near - wide(TOKENS)).abs().max() < 0.1 * wide(TOKENS).abs().max()


def test_command(tmp_path: Path) -> None:
    write_pth("6", tmp_path / "model.pth")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "model.pth"), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model_type"] == "rwkv6"
    with pytest.raises(ValueError, match="exists already"):
        command(tmp_path / "model.pth", tmp_path / "out")


class Evil:
    """What a pickle may hold."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"emb.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        read_pth(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        read_pth(tmp_path)
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pth"):
        read_pth(tmp_path / "text.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no table of tensors"):
        read_pth(tmp_path / "list.pth")
    weights = write_pth("7", tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut short"):
        read_pth(tmp_path / "short.pth")
    torch.save({k: v for k, v in weights.items() if k != "blocks.1.att.w2"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*decay\.up\.weight"):
        convert(tmp_path / "part.pth", tmp_path / "out")
    torch.save({**weights, "blocks.1.att.w9": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"no rule knows the tensor 'blocks\.1\.att\.w9'"):
        convert(tmp_path / "more.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no tensor 'emb\.weight'"):
        config_of_rwkv({"model.embed.weight": torch.zeros(2, 2)}, Path("a.pth"))
    old = write_pth("5", tmp_path / "five.pth")
    old = {k: v[:, :1] if k.endswith("time_decay") else v for k, v in old.items()}
    with pytest.raises(ValueError, match="preview of RWKV-5"):
        config_of_rwkv(old, Path("a.pth"))


# Counts to the parameter where they were published so, else the figures of the papers and of the model cards.
PUBLISHED = {
    "rwkv-4-169m": 1.693e8, "rwkv-4-430m": 4.304e8, "rwkv-4-1.5b": 1.515e9, "rwkv-4-3b": 2.985e9,
    "rwkv-4-7b": 7.393e9, "rwkv-4-14b": 1.415e10,
    "rwkv-5-0.4b": 4.62e8, "rwkv-5-1.5b": 1.58e9, "rwkv-5-3b": 3.06e9, "rwkv-5-7b": 7.52e9,
    "rwkv-6-1.6b": 1.60e9, "rwkv-6-3b": 3.10e9, "rwkv-6-7b": 7.64e9,
    "rwkv-7-0.1b": 191_034_624, "rwkv-7-0.4b": 450_767_872, "rwkv-7-1.5b": 1_527_404_544,
    "rwkv-7-2.9b": 2_947_735_040,
}  # fmt: skip
FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "4": lambda V, D, L: 2 * V * D + 13 * D * D * L + D * (11 * L + 4),  # 2305.13048
    "5": lambda V, D, L: 13 * D * D * L + 14 * D * L + 4 * D + 2 * D * V,  # 2404.05892
    "6": lambda V, D, L: 13 * D * D * L + 464 * D * L + 4 * D + 2 * D * V,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    family, hf = published(name)
    with torch.device("meta"):
        model = family.read(hf).build()
    want = PUBLISHED[name]
    if isinstance(want, int):
        assert count(model) == want
    else:
        digits = 3 if name[5] == "4" else 2
        assert f"{count(model):.{digits}e}" == f"{want:.{digits}e}"
    if name[5] in FORMULAS and name != "rwkv-6-7b":  # whose low-rank maps are twice as wide
        shape = hf["vocab_size"], hf["hidden_size"], hf["num_hidden_layers"]
        assert count(model) == FORMULAS[name[5]](*shape)
    near, far = figures(model, context=100), figures(model, context=1_000_000)
    assert near.flops == far.flops and near.cache == far.cache and far.cache_growth == 0


def test_goose_with_the_map_that_is_not_used() -> None:
    """The authors' own count of parameters and of state: L (2 D + 64 D) numbers."""
    family, hf = published("rwkv-7-0.4b")
    with torch.device("meta"):
        model = family.read({**hf, "first_value_map": True}).build()
    assert count(model) == 450_834_432
    assert figures(model, dtype=torch.float32).cache == 4 * 24 * (2 * 1024 + 64 * 1024) == 4 * 1_622_016
