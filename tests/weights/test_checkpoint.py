"""Directories in and out: nothing wrong gets in unnoticed, and nothing half-written is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import landmark
from landmark.models.base import Model
from landmark.models.decoder import Decoder
from landmark.nn.residual import Sandwich
from landmark.weights import files
from landmark.weights.checkpoint import describe

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    landmark.save(landmark.build(HF), tmp_path / "m")
    return tmp_path / "m"


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    hf = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in hf.items() if v != "remove"}))


def edit_weights(directory: Path, change: Callable[[dict], dict]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def same(a: Model, b: Model) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_round_trip_and_shards(directory: Path, tmp_path: Path) -> None:
    model = landmark.load(directory)
    assert not model.training
    landmark.save(model, tmp_path / "sharded", shard_bytes=4000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert same(model, landmark.load(tmp_path / "sharded"))
    landmark.save(model, tmp_path / "sharded")  # one file again; the old shards go
    assert [p.name for p in (tmp_path / "sharded").glob("*.safetensors*")] == ["model.safetensors"]


def test_transformers_loads_what_we_save(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 60, (2, 9))
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        assert (theirs(tokens).logits - landmark.load(directory)(tokens)).abs().max() < 1e-5


def test_dtype(directory: Path, tmp_path: Path) -> None:
    model = landmark.load(directory, dtype="bf16")
    assert model.dtype == torch.bfloat16
    landmark.save(model, tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert landmark.load(tmp_path / "bf16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'bfloat61'; did you mean 'bfloat16'"):
        landmark.load(directory, dtype="bfloat61")


def test_a_config_no_published_class_has(directory: Path, tmp_path: Path) -> None:
    """Changing a config gives a model of our own, saved with that config and loaded back."""
    model = landmark.load(directory)
    assert isinstance(model, Decoder)
    norm = model.cfg.norm
    layers = tuple({n: Sandwich.Config(fn=s.fn, norm=norm, post=norm) for n, s in x.items()} for x in model.cfg.layers)
    ours = dataclasses.replace(model.cfg, layers=layers).build().eval()
    landmark.save(ours, tmp_path / "own")
    back = landmark.load(tmp_path / "own")
    assert back.cfg == ours.cfg and same(ours, back)
    landmark.save(back, tmp_path / "again")
    assert same(back, landmark.load(tmp_path / "again"))


def test_companions_travel(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).write_text("{}")
    landmark.save(landmark.load(directory), tmp_path / "copy")
    copied = {p.name for p in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= copied


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """Loading touches no weights: resident memory grows by far less than the file."""
    big = {**HF, "vocab_size": 50_000, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 512}
    landmark.save(landmark.build(big), tmp_path / "big")
    weights = (tmp_path / "big" / "model.safetensors").stat().st_size
    script = (
        "import landmark, resource, sys, torch; landmark.load;"
        "from landmark.models.registry import families; families();"
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; m = landmark.load(sys.argv[1]);"
        "b = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; print((b - a) * 1024)"
    )
    import subprocess
    import sys

    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    assert weights > 200e6 and int(out.stdout) < weights / 4, out.stdout
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def cut(weights: dict, name: str) -> dict:
    return {k: v for k, v in weights.items() if k != name}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: edit_config(d, architectures=["LlamaForCausalML"]),
            "LlamaForCausalML'; did you mean 'LlamaForCausalLM",
        ),
        (
            lambda d: edit_config(d, architectures="remove", model_type="lama"),
            "names no architecture; add \"architectures\": its model_type is 'lama', which is not known",
        ),
        (lambda d: edit_config(d, hidden_size="remove"), "no key 'hidden_size'"),
        (lambda d: edit_config(d, attention_sink=4), "key 'attention_sink' = 4 is not understood"),
        (lambda d: edit_config(d, quantization_config={"bits": 4}), "quantization_config"),
        (lambda d: edit_config(d, hidden_act="swoosh"), "swoosh"),
        (lambda d: edit_config(d, hidden_size=-16), "-16|-8"),
        (
            lambda d: edit_config(d, rope_scaling={"rope_type": "yarnn", "factor": 2}),
            "unknown rope type 'yarnn'; did you",
        ),
        (lambda d: edit_config(d, rope_scaling={"rope_type": "linear", "fctor": 2}), "'fctor'.*did you mean 'factor'"),
        (lambda d: edit_config(d, intermediate_size=25), r"has the shape \(24, 16\), but config.json says \(25, 16\)"),
        (lambda d: edit_weights(d, lambda w: cut(w, NORM)), "lacks 1 tensors, .* 'norm.weight'"),
        (
            lambda d: edit_weights(d, lambda w: w | {"model.extra": torch.zeros(1)}),
            "no rule knows the tensor 'model.extra'",
        ),
        (lambda d: edit_config(d, num_hidden_layers=1), "too many"),
        (lambda d: edit_config(d, hidden_size="16"), "hidden_size is '16'; it must be a whole number"),
        (lambda d: edit_config(d, num_hidden_layers=1.5), "num_hidden_layers is 1.5"),
        (lambda d: edit_config(d, rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; it must be a number"),
        (lambda d: edit_config(d, tie_word_embeddings="no"), "tie_word_embeddings is 'no'; it must be true or false"),
        (lambda d: edit_config(d, rope_scaling="yarn"), "rope_scaling is 'yarn'; it must be an object"),
        (
            lambda d: edit_config(d, rope_scaling={"rope_type": "linear", "factor": "x"}),
            "the rope parameter factor is 'x'",
        ),
        (lambda d: edit_config(d, hidden_act=5), "unknown activation 5"),
        (lambda d: edit_config(d, architectures="LlamaForCausalLM"), "architectures is .* it must be a list"),
        (lambda d: edit_weights(d, lambda w: w | {NORM: w[NORM].int()}), "'norm.weight' holds torch.int32"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list; it must be a JSON object"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text("[" * 9999 + "]" * 9999), "not valid JSON"),
        (lambda d: (d / "config.json").unlink(), "does not exist"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 99), "truncated or corrupt"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "truncated"),
    ],
)
def test_wrong_directories(directory: Path, change: Callable[[Path], None], message: str) -> None:
    change(directory)
    with pytest.raises(ValueError, match=message):
        landmark.load(directory)


def test_a_model_type_with_one_architecture_needs_not_name_it(directory: Path) -> None:
    named = landmark.load(directory)
    edit_config(directory, architectures="remove")
    assert same(landmark.load(directory), named)
    with pytest.raises(ValueError, match="unknown architecture 'LlamaForCausal'; did you mean 'LlamaForCausalLM'"):
        landmark.load(directory, architecture="LlamaForCausal")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/llama"}')
    for read in (landmark.load, describe):
        with pytest.raises(ValueError, match=r"is an adapter; give the model that it is for \(me/llama\)"):
            read(tmp_path)


def test_a_pickle_is_never_opened(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        landmark.load(directory)


def test_missing_shard(directory: Path, tmp_path: Path) -> None:
    landmark.save(landmark.load(directory), tmp_path / "s", shard_bytes=4000)
    shard = sorted((tmp_path / "s").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        landmark.load(tmp_path / "s")


def test_paths_that_are_no_directories(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a file; give the directory"):
        landmark.load(directory / "config.json")
    with pytest.raises(ValueError, match="is a file; a model is saved to a directory"):
        landmark.save(landmark.load(directory), directory / "config.json")
    with pytest.raises(ValueError, match="no directory, and no hub id"):
        landmark.load(directory / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no-such/model is no directory here, and the hub does not give it"):
        landmark.load("no-such/model")


def test_weights_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        files.write_file(tmp_path / "w.safetensors", {"a": torch.ones(2)})
        os.umask(before)
        assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode


def test_a_full_disk_leaves_the_old_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = landmark.load(directory)
    with torch.no_grad():
        changed = landmark.build(HF)

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device; what stood there before is untouched"):
        landmark.save(changed, directory)
    assert same(model, landmark.load(directory))
    assert not list(directory.glob(".*tmp"))


def test_describe_reads_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    config, hf = describe(directory)
    assert hf["hidden_size"] == 16 and config == describe(directory / "config.json")[0]
    with pytest.raises(ValueError, match="no published size is called 'lama'"):
        describe("lama")


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    out, left = tmp_path / "out", tmp_path / ".out.tmp"
    left.mkdir()
    (left / "half").touch()  # of a process that was killed
    with pytest.raises(KeyboardInterrupt), files.new_directory(out) as fresh:
        assert not list(fresh.iterdir())
        (fresh / "a").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with files.new_directory(out) as fresh:
        (fresh / "a").touch()
    assert list(tmp_path.rglob("*")) == [out, out / "a"]


def test_weights_that_may_not_be_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)  # whoever runs the tests may be allowed everything
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        landmark.load(directory)


def test_companions_are_whole_or_not_there(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "tokenizer.json").write_text("{}")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*copy/tokenizer.json'"):
        landmark.save(landmark.load(directory), tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*tokenizer*"))
