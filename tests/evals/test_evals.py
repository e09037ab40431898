"""The three methods against explicit sums, and the harness' tasks against its own model class on the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.data.corpora import Embedded
from landmark.evals.choices import evaluate_choices, read_questions
from landmark.evals.likelihood import LanguageModel
from landmark.infer.sampling import Sampling
from landmark.weights.tokenizer import Tokenizer
from landmark.weights.tokenizer_train import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 5 + "Ünïcode — and code: def f(x): return x\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    texts = [document.text for document, _ in zip(Embedded(), range(20), strict=False)]
    tokenizer = train_tokenizer("bpe", texts, 500)
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model = landmark.build(hf)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.1
    landmark.save(model, directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def lm(directory: Path) -> LanguageModel:
    return LanguageModel(landmark.load(directory, dtype="float64"), Tokenizer.load(directory), budget=100)  # type: ignore[arg-type]


def logprobs(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).log_softmax(-1)[0]


def test_likelihood_is_the_sum(lm: LanguageModel) -> None:
    requests = [("The quick", " brown fox"), ("", "The"), ("def f", "(x):"), ("trailing space ", "moves over")] * 3
    for (context, continuation), got in zip(requests, lm.loglikelihood(requests), strict=True):
        first, second = lm.split(context, continuation)
        table = logprobs(lm, first + second)[len(first) - 1 : -1]
        want = table.gather(1, torch.tensor(second)[:, None]).sum().item()
        assert math.isclose(got.logprob, want, rel_tol=1e-9)
        assert got.greedy == (table.argmax(-1).tolist() == second)


def test_greedy_text_is_greedy(lm: LanguageModel) -> None:
    (said,) = lm.generate_until([("The quick", Sampling(temperature=0.0, max_tokens=5))])
    ids = lm.tokenizer.encode("The quick")
    table = logprobs(lm, ids)
    (token,) = lm.loglikelihood_ids([(ids, [int(table[-1].argmax())])])
    assert token.greedy and isinstance(said, str)


def test_rolling_counts_every_token_once(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(TEXT)
    assert len(ids) > 2 * lm.longest
    text, size, want = [lm.prefix, *ids], lm.longest, 0.0
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        window = text[max(0, last - size) : last]
        table = logprobs(lm, window)[first - last :]
        want += table.gather(1, torch.tensor(ids[first:last])[:, None]).sum().item()
    out = lm.perplexity(TEXT)
    assert math.isclose(-out.nats, want, rel_tol=1e-9) and out.tokens == len(ids)
    assert math.isclose(out.bits_per_byte, out.nats / math.log(2) / len(TEXT.encode()))


def test_a_stride_gives_more_context(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(TEXT)
    windows = list(lm._windows(ids, 7))
    counted = [t for _, targets in windows for t in targets if t >= 0]
    assert counted == ids
    assert all(len(inputs) == lm.longest for inputs, _ in windows[1:])
    with pytest.raises(ValueError, match="a stride of -1"):
        lm.perplexity(TEXT, stride=-1)


def test_choices(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"context": f"{n} plus one is", "choices": [f" {n + 1}", f" {n + 5}"], "answer": 0} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    out = evaluate_choices(lm, read_questions(path), shots=2)
    assert out.questions == 6 and out.chance == 0.5 and 0 <= out.accuracy <= 1
    swapped = [{**row, "answer": 1} for row in rows]
    path.write_text("\n".join(map(json.dumps, swapped)))
    assert math.isclose(evaluate_choices(lm, read_questions(path)).accuracy + evaluate_zero(lm, rows, path), 1.0)


def test_a_choice_that_ends_a_token_of_the_context(lm: LanguageModel) -> None:
    """ "i" + "n" is one token, so nothing follows the context; then each is read by itself."""
    join = lm.tokenizer.encode("in")
    assert len(join) == 1
    assert lm.split("i", "n") == (lm.tokenizer.encode("i"), lm.tokenizer.encode("n"))


def evaluate_zero(lm: LanguageModel, rows: list[dict], path: Path) -> float:
    path.write_text("\n".join(map(json.dumps, rows)))
    return evaluate_choices(lm, read_questions(path)).accuracy


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "line 1"),
        ("", "holds no questions"),
        ('{"context": "a", "choices": ["b", 2], "answer": 0}', "line 1: the choice 2 is no text"),
        ('{"context": 5, "choices": ["b", "c"], "answer": 0}', "line 1: the context 5 is no text"),
    ],
)
def test_bad_questions(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_command(directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    out = CliRunner().invoke(app, ["eval", str(directory), "--text", str(text), "--json"])
    assert out.exit_code == 0, out.output
    (row,) = json.loads(out.stdout)
    assert row["bytes"] == len(TEXT.encode()) and row["bits_per_byte"] > 0


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
{rest}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]"""
ROLLING = """doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"""
UNTIL = """doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]"""


def test_harness_tasks_from_local_files(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal figures from our adapter and from the harness' own class over transformers."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from landmark.evals.harness import run_tasks

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    rows = [
        {"context": f"{n} plus one is", "choices": [f" {n + 1}", f" {n + 5} or so"], "answer": n % 2} for n in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, kind, rest in (
        ("choice", "multiple_choice", CHOICE),
        ("rolling", "loglikelihood_rolling", ROLLING),
        ("until", "generate_until", UNTIL),
    ):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, rest=rest))
    names = ["choice", "rolling", "until"]
    model = LanguageModel(landmark.load(directory), Tokenizer.load(directory))  # type: ignore[arg-type]
    ours = run_tasks(model, names, include=tasks)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(directory), device="cpu", add_bos_token=False, max_length=48), tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    compared = 0
    for name in names:
        for key, value in theirs[name].items():
            if isinstance(value, float) and not math.isnan(value):
                assert math.isclose(ours[name][key], value, rel_tol=1e-4), (name, key)
                compared += 1
    assert compared >= 4
    with pytest.raises(ValueError, match="no task is called 'choise'"):
        run_tasks(model, ["choise"], include=tasks)
