"""Runs from TOML: what a file may say, and what it is told when it says something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
from landmark.config import to_dict
from landmark.nn.bitlinear import BitLinear
from landmark.objectives.lm import CausalLM
from landmark.train import WSD, AdamW, Callback, Cosine, Interrupted, InverseSqrt, Lion, Muon, TrainConfig, train
from landmark.train.read import override, parse, read_toml
from landmark.transforms.bitnet import bitnet, pack_ternary
from landmark.transforms.quantise import quantised
from landmark.weights.tokenizer import Tokenizer
from tests.train.common import same, weights

MODEL = """
[model]
architectures = ["LlamaForCausalLM"]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small book: one document."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {i}: the {i % 7} of them said {i * i} and went.\n" for i in range(900)))
    return path


@pytest.fixture
def toml(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
out = "{tmp_path / "out"}"
steps = 6
peak_flops = 1e12
schedule = {{warmup = 2}}
tokenizer = {{vocab_size = 300}}
data = {{corpus = "{text}", rows = 4, length = 32}}
evaluation = {{every = 3, batches = 2}}
checkpoints = {{every = 2}}
{MODEL}"""
    )
    return path


def read(path: Path, *assignments: str) -> TrainConfig:
    return parse(TrainConfig, override(read_toml(path), assignments))


def test_the_smallest_file() -> None:
    config = parse(TrainConfig, {"out": "x", "steps": 500})
    assert config == TrainConfig(out="x", steps=500)
    saved = json.loads(json.dumps(to_dict(config)))
    config.check_same(saved, step=3)
    saved["data"]["rows"] = 9
    with pytest.raises(ValueError, match=r"begun with data.rows = 9, and cannot go on with 8"):
        config.check_same(saved, step=3)


def test_tables_change_defaults_and_types_choose_classes() -> None:
    config = parse(TrainConfig, {"out": "x", "steps": 500, "schedule": {"final": 0.0}, "optimizer": {"lr": 1}})
    assert config.schedule == Cosine(warmup=100, final=0.0) and config.optimizer == AdamW.Config(lr=1.0)
    config = parse(TrainConfig, {"out": "x", "steps": 9000, "schedule": "inversesqrt", "optimizer": {"type": "muon"}})
    assert config.schedule == InverseSqrt() and config.optimizer == Muon.Config()


def test_set(toml: Path) -> None:
    changes = ("optimizer.type=lion", "optimizer.lr=1e-5", "data.rows=8", "schedule=wsd", "evaluation.prompts=['a']")
    config = read(toml, *changes, "model.hidden_size=64", "out=runs/x y")
    assert config.optimizer == Lion.Config(lr=1e-5) and config.data.rows == 8 and config.schedule == WSD()
    assert config.evaluation.prompts == ("a",) and config.out == "runs/x y"
    assert isinstance(config.model, dict) and config.model["hidden_size"] == 64


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate=1", r"the configuration of a run has no key 'learning_rate'"),
        ("stesp=3", r"no key 'stesp'; did you mean 'steps'\?"),
        ("optimizer.wieght_decay=0.1", r"\[optimizer\] has no key 'wieght_decay'; did you mean 'weight_decay'\?"),
        ("data.lenght=5", r"\[data\] has no key 'lenght'; did you mean 'length'\?"),
        ("schedule.type=cosin", r"schedule.type is 'cosin'; did you mean 'cosine'\?; choose one of"),
        ("dtype=bf16", r"dtype is 'bf16'.*choose one of float32, bfloat16"),
        ("steps=-3", r"TrainConfig.steps is -3; it must be a whole number of at least 1"),
        ("steps=1.5", r"steps is 1.5; it must be a whole number"),
        ("steps=true", r"steps is True; it must be a whole number"),
        ("data.rows=0", r"DataConfig.rows is 0"),
        ("data.length=-1", r"DataConfig.length is -1"),
        ("data.held_out=1.5", r"data.held_out is 1.5"),
        ("data.weight=0.0", r"the weight of .* is 0.0"),
        ("optimizer.lr=fast", r"optimizer.lr is 'fast'; it must be a number"),
        ("optimizer.lr=nan", r"AdamW.lr is nan"),
        ("optimizer.lr=-1.0", r"AdamW.lr is -1.0"),
        ("optimizer=3", r"optimizer is 3; it must be a table"),
        ("objective.z_loss=-1.0", r"objective.z_loss is -1.0"),
        ("accumulate=0", r"TrainConfig.accumulate is 0"),
        ("nothing", r"--set nothing: write it as key=value"),
    ],
)
def test_bad_keys_and_values(toml: Path, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(toml, assignment)


def test_missing_keys() -> None:
    with pytest.raises(ValueError, match="the configuration of a run needs the key 'steps'"):
        parse(TrainConfig, {"out": "x"})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is a directory"):
        read_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad.toml is not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")


def test_a_run_from_text_to_model(toml: Path, tmp_path: Path) -> None:
    """Text in, a model directory with its tokenizer out, which goes on as the start of another run."""
    run = train(read(toml))
    out = tmp_path / "out"
    model, tokenizer = landmark.load(out), Tokenizer.load(out)
    assert model.cfg.embed.vocab == tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("Line 5: ")) == "Line 5: "
    assert run.evaluated is not None and run.evaluated[1]["bits_per_byte"] > 0
    assert (Tokenizer.load(out / "checkpoints" / "step-00000006")).fingerprint == tokenizer.fingerprint
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = train(read(toml, f"model={out}", f"out={tmp_path / 'more'}", "optimizer.lr=1e-9", "steps=2"))
    assert again.model.cfg == model.cfg
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_real_text_goes_on_to_the_same_bits(toml: Path, tmp_path: Path) -> None:
    """Stopped in the middle, with the text touched meanwhile: the run goes on with what it had tokenised."""

    class Stop(Callback):
        def update(self, run: Any, record: dict[str, Any]) -> None:
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    whole = train(read(toml, f"out={tmp_path / 'whole'}"))
    with pytest.raises(Interrupted):
        train(read(toml), callbacks=[Stop()])
    (tmp_path / "book.txt").touch()
    rest = train(read(toml), resume=True)
    assert same(weights(whole.model), weights(rest.model))
    with pytest.raises(ValueError, match=r"begun with data.rows = 4, and cannot go on with 2"):
        train(read(toml, "data.rows=2"), resume=True)


def test_held_out_text_is_not_trained_on(toml: Path, text: Path, tmp_path: Path) -> None:
    train(read(toml, "data.held_out=0.1"))
    from landmark.data.shards import Shards

    tokenizer = Tokenizer.load(tmp_path / "out")
    parts = [Shards(tmp_path / "out" / "prepared" / name) for name in ("train-0", "held-out-0")]
    trained, held = ("".join(tokenizer.decode(part[i].tolist()) for i in range(len(part))) for part in parts)
    assert trained + held == text.read_text()
    assert 0.05 < len(held) / len(trained + held) < 0.15


def test_a_mixture_and_other_held_out_text(toml: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 500)
    mixture = f"[{{corpus = '{text}', weight = 3}}, {{corpus = '{other}'}}]"
    run = train(read(toml, f"data.mixture={mixture}", f"data.held_out={other}"))
    assert [source["weight"] if isinstance(source, dict) else source[1] for source in sources(run)] == [3.0, 1.0]


def sources(run: Any) -> list[Any]:
    return run.batches.state_dict()["settings"]["corpora"]


def test_keywords_and_the_package_itself(text: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"steps": 2, "schedule": "constant", "peak_flops": 1e12, "tokenizer": {"vocab_size": 300}}
    model = read_toml_text(MODEL)["model"]
    data = {"corpus": str(text), "rows": 2, "length": 16}
    run = landmark.train(out=str(tmp_path / "out"), model=model, data=data, **keys)
    assert run.step == 2 and isinstance(run.objective, CausalLM)


def read_toml_text(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.corpus=/nowhere/*.txt"], r"/nowhere/\*.txt matches no file"),
        (["data.rows=4096"], r"holds [\d,]+ tokens, fewer than one batch of 4096 x 32"),
        (["data.length=128"], r"data.length is 128, but the model was made for 64 tokens at most"),
        (["model.vocab_size=100"], r"the model's vocabulary has 100 tokens, the tokenizer 300"),
        (["tokenizer.vocab_size=20"], r"vocab_size 20 is too small"),
        (["tokenizer.path=/nowhere"], r"/nowhere: no such tokenizer"),
        (["model.hidden_sise=5"], r"key 'hidden_sise' = 5 is not understood for LlamaForCausalLM"),
        (["model.architectures=['LlamaForCausalLN']"], r"unknown architecture 'LlamaForCausalLN'; did you mean"),
        (["model=llama2-7c"], r"no published size is called 'llama2-7c'; did you mean"),
        (["model.type='GLU'"], r"GLU has no field"),
        (["out="], "out is empty"),
        (["data.corpus=[]"], "the list of a corpus' files is empty"),
    ],
)
def test_what_cannot_work(toml: Path, assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(read(toml, *assignments))


def test_no_run_replaces_a_model(toml: Path, tmp_path: Path) -> None:
    landmark.save(landmark.build(read_toml(toml)["model"] | {"vocab_size": 300}), tmp_path / "out")
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "out").rglob("*"))
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a model, and no run"):
            train(read(toml), resume=resume)
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize("change", [lambda m: quantised(m, "int8"), lambda m: pack_ternary(bitnet(m))])
def test_codes_are_not_trained(toml: Path, tmp_path: Path, change: Any) -> None:
    """Only norms and embeddings would learn, without a word."""
    made = train(read(toml, "steps=2", f"out={tmp_path / 'first'}"))
    landmark.save(change(landmark.load(made.out)), tmp_path / "codes")
    with pytest.raises(ValueError, match="codes are codes, which are used and not trained"):
        train(read(toml, f"model={tmp_path / 'codes'}"))


def test_paths_may_begin_at_home(toml: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand them in TOML; a byte order mark is no key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    toml.write_text("\ufeff" + toml.read_text().replace(str(tmp_path), "~"))
    train(read(toml))
    again = train(read(toml, "model=~/out", "tokenizer.path=~/out", "out=~/more", "data.corpus=~/*.txt"))
    assert again.out == tmp_path / "more" and (tmp_path / "more" / "model.safetensors").exists()


@pytest.mark.parametrize(("data", "message"), [(b"", "holds no text"), (b"\0\1\2" * 100, "is binary")])
def test_empty_and_binary_text(toml: Path, text: Path, data: bytes, message: str) -> None:
    text.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        train(read(toml))


def landmark_train(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "landmark.cli.main", "train", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def test_command_line(toml: Path, tmp_path: Path) -> None:
    """A bad key, an interrupt, going on, and JSON at the end."""
    bad = landmark_train(str(toml), "--set", "optimiser.lr=1")
    assert bad.communicate()[1].strip().endswith("has no key 'optimiser'; did you mean 'optimizer'?; it has " + keys())
    assert bad.returncode == 2
    cut = landmark_train(str(toml), "--set", "steps=100000")
    log = tmp_path / "out" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert cut.poll() is None
        time.sleep(0.01)
    cut.send_signal(signal.SIGINT)
    line = cut.communicate()[1].strip().splitlines()[-1]
    assert cut.returncode == 130
    assert "all saved in" in line and line.endswith(f"landmark train {toml} --set steps=100000 --resume")
    step = int((tmp_path / "out" / "checkpoints" / "LATEST").read_text().removeprefix("step-"))
    ended = landmark_train(str(toml), "--set", f"steps={step + 3}", "--set", "schedule=constant", "--resume", "--json")
    assert "begun with schedule = 'Cosine'" in ended.communicate()[1] and ended.returncode == 2


def keys() -> str:
    from landmark.config import fields

    return ", ".join(f.name for f in fields(TrainConfig))


@pytest.mark.slow
def test_torchrun(toml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "landmark.cli.main"]
    for kind in ("ddp", "fsdp"):
        arguments = ["train", str(toml), "--json", "--set", f"parallel={kind}", "--set", f"out={tmp_path / kind}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == 6
        assert landmark.load(tmp_path / kind).cfg.embed.vocab == 300


BERT = {
    "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
MARIAN = {
    "architectures": ["MarianMTModel"], "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "activation_function": "relu", "max_position_embeddings": 64, "scale_embedding": True,
}  # fmt: skip


def run_of(text: Path, out: Path, **keys: Any) -> Any:
    common: dict[str, Any] = {"out": str(out), "steps": 4, "schedule": "constant", "peak_flops": 1e12}
    data = {"corpus": str(text), "rows": 4, "length": 32, **keys.pop("data", {})}
    return train(**{**common, "data": data, "tokenizer": {"vocab_size": 300}, **keys})


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 200), ("bpe", 300)])
def test_masked_language_model(text: Path, tmp_path: Path, kind: str, size: int) -> None:
    tokenizer = {"kind": kind, "vocab_size": size}
    run = run_of(
        text, tmp_path / "out", model=BERT, objective={"type": "MaskedLM", "probability": 0.3}, tokenizer=tokenizer
    )
    assert run.evaluated is not None and run.evaluated[1]["mlm"] > 0
    assert Tokenizer.load(tmp_path / "out").mask_id is not None
    assert type(landmark.load(tmp_path / "out")).__name__ == "Encoder"


def test_sequence_to_sequence(tmp_path: Path) -> None:
    """Encoded as in training, a source ends with eos, and a target begins with the decoder's start."""
    pairs = tmp_path / "pairs.jsonl"
    words = ["red", "green", "blue", "old", "new"]
    lines = [{"text": f"{a} {b} {i}", "target": f"{i} {b} {a}"} for a in words for b in words for i in range(20)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_of(pairs, tmp_path / "out", model=MARIAN, objective="seq2seq", data={"target": "target", "held_out": 0.1})
    tokenizer = Tokenizer.load(tmp_path / "out")
    batch = run.held_out[0]
    length = int(batch.source_segments[0].sum())
    source = batch.source[0, :length].tolist()
    assert tokenizer.encode(tokenizer.decode(source), special=True) == source and source[-1] == tokenizer.eos_id
    assert batch.target_in[0, 0] == run.model.cfg.start
    assert run.evaluated is not None and run.evaluated[1]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"objective": "MaskedLM", "model": read_toml_text(MODEL)["model"]},
            r"the objective MaskedLM trains an encoder, but \[model\] is a decoder",
        ),
        (
            {"objective": "MaskedLM", "model": MARIAN},
            r"but \[model\] is an encoder-decoder",
        ),
        ({"tokenizer": {"kind": "wordpiece", "vocab_size": 300}}, r"'wordpiece' has no token that ends a text"),
        ({"objective": {"type": "MaskedLM", "probability": 0.0}}, r"objective.probability is 0.0"),
        ({"objective": {"type": "CausalLM", "label_smoothing": 1.0}}, r"objective.label_smoothing is 1.0"),
    ],
)
def test_parts_that_do_not_fit(text: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(text, tmp_path / "out", **keys)


def test_ternary_linear_maps(toml: Path, tmp_path: Path) -> None:
    """`linear = "BitLinear"` makes those of any model ternary, and a run that goes on from it keeps them."""
    model = train(read(toml, 'linear="BitLinear"', "steps=3")).model
    config = landmark.load(tmp_path / "out").cfg
    assert config == model.cfg and isinstance(config.linear, BitLinear.Config)
    for more in ([], ["linear=BitLinear"]):
        again = train(read(toml, f"model={tmp_path / 'out'}", f"out={tmp_path / f'more{len(more)}'}", "steps=3", *more))
        assert again.model.cfg == config
