"""What each objective reads and learns in a run, and what is said of data and models that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

import landmark
from landmark.config import CONFIGS
from landmark.data.batches import IGNORE
from landmark.parallel.world import World
from landmark.train import Callback, Run, TrainConfig, train
from landmark.train.objectives import ObjectiveConfig
from landmark.train.prepare import Prepared
from landmark.train.read import parse
from landmark.train.run import fitting_model

BODY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
BERT = {"architectures": ["BertForMaskedLM"], **BODY}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
REVIEWS = [
    {"text": f"It was a {('bad', 'good')[i % 2]} film, {i}.", "label": ("no", "yes")[i % 2], "second": f"Say {i}."}
    for i in range(60)
]
CITIES = [{"tokens": ["Constantinople", "fell", str(i)], "tags": ["PLACE", "O", "NUMBER"]} for i in range(60)]
CONTEXTS = [f"In year {i} good Peter Smith went home." for i in range(60)]
ANSWERS = [
    {"question": "Who?", "context": c, "answers": {"text": ["Peter Smith"], "answer_start": [c.index("Peter")]}}
    for c in CONTEXTS
]

ASKED = [
    {"context": f"Day {i} was", "choices": [("wet", "odd")[(i + j) % 2] + f" {j}." for j in range(3)], "answer": i % 3}
    for i in range(60)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(out: Path, corpus: Any, objective: Any, **keys: Any) -> TrainConfig:
    data = {"corpus": corpus, "rows": 4, "length": 32, "held_out": 0.2, **keys.pop("data", {})}
    tokenizer = {"vocab_size": 400, **keys.pop("tokenizer", {})}
    common = {"out": str(out), "steps": 3, "schedule": "constant", "peak_flops": 1e12, "model": BERT}
    return parse(TrainConfig, {**common, "data": data, "tokenizer": tokenizer, "objective": objective, **keys})


def begin(config: TrainConfig) -> tuple[Prepared, Any, Any]:
    """What a run begins with: what is prepared, the model, and its first batch."""
    prepared = Prepared(config, Path(config.out))
    prepared.make()
    model = fitting_model(config, prepared)
    return prepared, model, next(prepared.pipeline.batches(model, ALONE))


def names(model: Any, head: str) -> tuple[str, ...]:
    return tuple(model.heads[head].cfg.labels)


def texts(folder: Path) -> str:
    for name in "ab":
        lines = [f"The {i % 7} of {name} said {i * i} and went. So it was with {i}." for i in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return f"{folder}/*.txt"


@pytest.mark.parametrize("second", [None, "second"])
def test_sequences(tmp_path: Path, second: str | None) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", REVIEWS))
    prepared, model, batch = begin(config(tmp_path / "out", corpus, {"type": "SequenceClassification", "pair": second}))
    tokenizer = prepared.tokenizer
    assert names(model, "classify") == ("no", "yes")
    for tokens, segments, types, label in zip(batch.tokens, batch.segments, batch.types, batch.labels, strict=True):
        ids = tokens[: int(segments.sum())].tolist()
        text = tokenizer.decode(ids)
        assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
        assert ("good" if label else "bad") in text and (second is None) == ("say" not in text)
        assert int(types.max()) == (0 if second is None else 1)


def test_a_trained_head_goes_on_and_a_strange_one_is_replaced(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", REVIEWS))
    first = train(config(tmp_path / "first", corpus, "SequenceClassification"))
    more = config(tmp_path / "second", corpus, "SequenceClassification", model=str(tmp_path / "first"))
    weight = begin(more)[1].heads["classify"].linear.weight
    assert torch.equal(weight, first.model.state_dict()["heads.classify.linear.weight"])
    others = str(write(tmp_path / "others.jsonl", [{**row, "label": f"{i % 3}"} for i, row in enumerate(REVIEWS)]))
    fresh = begin(config(tmp_path / "third", others, "SequenceClassification", model=str(tmp_path / "first")))[1]
    assert names(fresh, "classify") == ("0", "1", "2")
    assert torch.equal(fresh.embed.tokens.weight, first.model.state_dict()["embed.tokens.weight"])


def test_many_labels_and_values(tmp_path: Path) -> None:
    many = [{**row, "label": [["a"], ["b", "a"], []][i % 3]} for i, row in enumerate(REVIEWS)]
    objective = {"type": "SequenceClassification", "problem": "multi_label_classification"}
    _, model, batch = begin(config(tmp_path / "out", str(write(tmp_path / "many.jsonl", many)), objective))
    assert names(model, "classify") == ("a", "b") and {tuple(x) for x in batch.labels.tolist()} <= {
        (1, 0),
        (1, 1),
        (0, 0),
    }
    values = [{**row, "label": i / 10} for i, row in enumerate(REVIEWS)]
    objective["problem"] = "regression"
    run = train(config(tmp_path / "value", str(write(tmp_path / "values.jsonl", values)), objective))
    assert run.evaluated is not None and run.evaluated[1]["loss"] > 0
    hf = json.loads((tmp_path / "value" / "config.json").read_text())
    assert hf["problem_type"] == "regression" and hf["id2label"] == {"0": "score"}


def test_tags_stand_at_the_first_token_of_their_word(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", CITIES))
    prepared, model, batch = begin(
        config(tmp_path / "out", corpus, "TokenClassification", tokenizer={"vocab_size": 60})
    )
    labels = names(model, "tag")
    assert labels == ("NUMBER", "O", "PLACE")
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        tagged = [
            (prepared.tokenizer.id_to_token(t), labels[tag])
            for t, tag in zip(tokens, targets, strict=True)
            if tag != IGNORE
        ]
        assert [tag for _, tag in tagged] == ["PLACE", "O", "NUMBER"]
        assert tagged[0][0].startswith("c") and tagged[1][0].startswith("f") and not tagged[2][0].startswith("##")


def test_spans_are_the_tokens_of_the_answer(tmp_path: Path) -> None:
    corpus = str(
        write(
            tmp_path / "rows.jsonl",
            [*ANSWERS, *({**a, "answers": {"text": [], "answer_start": []}} for a in ANSWERS[:9])],
        )
    )
    prepared, model, batch = begin(config(tmp_path / "out", corpus, "SpanExtraction", data={"rows": 20}))
    assert names(model, "span") == ("start", "end")
    seen = set()
    for tokens, (start, end) in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        seen.add("" if start == end == 0 else prepared.tokenizer.decode(tokens[start : end + 1]).strip())
    assert seen == {"", "peter smith"}
    cut = begin(config(tmp_path / "cut", corpus, "SpanExtraction", data={"length": 11}, tokenizer={"vocab_size": 60}))[
        2
    ]
    assert (cut.labels <= 0).all()  # answers that lie behind the end are not learned


def test_choices_of_a_question_stay_together(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", ASKED))
    made = config(tmp_path / "out", corpus, {"type": "MultipleChoice", "choices": 3})
    prepared, model, batch = begin(made)
    assert batch.tokens.shape[0] == 3 * 4 and model.cfg.main == "choose"
    pairs = zip(batch.tokens, batch.segments, strict=True)
    texts = [prepared.tokenizer.decode(ids[kept > 0].tolist()) for ids, kept in pairs]
    days = [int(re.findall(r"day (\d+)", text)[0]) for text in texts]
    assert all(days[i : i + 3] == [days[i]] * 3 and batch.labels[i] == days[i] % 3 for i in range(0, 12, 3))
    assert len({*days}) == 4 and batch.types.unique().tolist() == [0, 1]


def test_choices_are_learned(tmp_path: Path) -> None:
    """The one that is wet, wherever it stands, which chance finds in one of three."""
    rows = [
        {"context": f"day {i} was", "choices": [("odd", "wet")[i % 3 == j] for j in range(3)], "answer": i % 3}
        for i in range(200)
    ]
    made = config(
        tmp_path / "out", str(write(tmp_path / "rows.jsonl", rows)), {"type": "MultipleChoice", "choices": 3},
        steps=40, data={"rows": 8}, optimizer={"type": "AdamW", "lr": 3e-3},
        model={**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )  # fmt: skip
    run = train(made)
    assert run.evaluated is not None and run.evaluated[1]["accuracy"] > 0.9
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["architectures"] == ["BertForMultipleChoice"]
    more = config(tmp_path / "more", made.data.corpus, {"type": "MultipleChoice", "choices": 3}, model=str(run.out))
    weight = begin(more)[1].heads["choose"].linear.weight
    assert torch.equal(weight, run.model.state_dict()["heads.choose.linear.weight"])  # the head goes on


def test_generative_fine_tuning(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", REVIEWS))
    table = {**LLAMA, "tie_word_embeddings": False}
    plain = train(config(tmp_path / "plain", texts(tmp_path), "CausalLM", model=table))
    tuned = config(tmp_path / "tuned", corpus, "GenerativeFineTuning", model=str(tmp_path / "plain"))
    prepared, model, batch = begin(tuned)
    weights = plain.model.state_dict()
    assert torch.equal(model.heads["lm"].linear.weight, weights["head.linear.weight"])  # the language model goes on
    ids = batch.tokens[0][batch.segments[0] > 0].tolist()
    assert ids[0] == prepared.tokenizer.bos_id and ids[-1] == prepared.tokenizer.eos_id
    assert batch.targets[0][: len(ids)].tolist() == [*ids[1:], IGNORE]
    run = train(tuned)
    assert run.evaluated is not None and run.evaluated[1].keys() == {"loss", "label", "accuracy", "lm"}
    assert names(landmark.load(tmp_path / "tuned"), "classify") == ("no", "yes")


def test_documents_are_framed_for_masks(tmp_path: Path) -> None:
    """A published BERT tokenizer knows no bos and eos; [CLS] and [SEP] stand for them, and are never hidden."""
    prepared, model, batch = begin(config(tmp_path / "out", texts(tmp_path), "MaskedLM", data={"rows": 8}))
    source = prepared.sources("train")[0].shards
    for i in range(len(source)):
        assert source[i][0] == prepared.tokenizer.cls_id and source[i][-1] == prepared.tokenizer.sep_id
    hidden = batch.targets[batch.targets != IGNORE].tolist()
    assert hidden and not {prepared.tokenizer.cls_id, prepared.tokenizer.sep_id} & set(hidden)
    held = [list(prepared.pipeline.held_out(model)) for _ in range(2)]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*held, strict=True))


def test_sentence_order(tmp_path: Path) -> None:
    """A pair's second half comes first where the label says so."""
    model = {"architectures": ["AlbertForPreTraining"], "embedding_size": 16, **BODY}
    objective = {"type": "MaskedLM", "pairs": "sop", "probability": 0.01}
    lines = "\n\n".join(f"{i} is here." for i in range(100, 400))
    (tmp_path / "count.txt").write_text(lines)
    made = config(tmp_path / "out", str(tmp_path / "count.txt"), objective, model=model, data={"rows": 8})
    prepared, model_, _ = begin(made)
    pairs = prepared.pipeline.pairs(model_, "train", epochs=1)  # type: ignore[attr-defined]
    orders = set()
    for batch in pairs:
        for tokens, types, label in zip(batch.tokens, batch.types, batch.labels.tolist(), strict=True):
            halves = [prepared.tokenizer.decode(tokens[types == side].tolist()) for side in (0, 1)]
            numbers = [re.findall(r"\d{3}", half) for half in halves]  # but for one that is cut
            if all(numbers):
                orders.add((numbers[0][0] > numbers[1][0], bool(label)))
    assert orders == {(False, False), (True, True)}


class Killed(Exception):
    pass


class Kill(Callback):
    def saved(self, run: Run, directory: Path) -> None:
        raise Killed


def test_a_run_goes_on_with_the_same_rows_only(tmp_path: Path) -> None:
    corpus = write(tmp_path / "rows.jsonl", REVIEWS)
    made = config(tmp_path / "out", str(corpus), "SequenceClassification", checkpoints={"every": 1})
    with pytest.raises(Killed):
        train(made, callbacks=[Kill()])
    write(corpus, REVIEWS[1:])
    with pytest.raises(ValueError, match="batches cannot go on where others stopped: data was"):
        train(made, resume=True)
    write(corpus, REVIEWS)
    assert train(made, resume=True).step == 3


def test_rows_of_parquet_train_as_those_of_json_lines(tmp_path: Path) -> None:
    lines = str(write(tmp_path / "rows.jsonl", REVIEWS))
    parquet.write_table(pa.Table.from_pylist(REVIEWS), tmp_path / "rows.parquet")
    batches = [
        begin(config(tmp_path / name, corpus, "SequenceClassification"))[2]
        for name, corpus in (("a", lines), ("b", str(tmp_path / "rows.parquet")))
    ]
    assert torch.equal(batches[0].tokens, batches[1].tokens) and torch.equal(batches[0].labels, batches[1].labels)


def test_nothing_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", [*REVIEWS, *REVIEWS]))
    prepared, _, _ = begin(config(tmp_path / "out", corpus, "SequenceClassification"))
    parts = prepared.pipeline.parts  # type: ignore[attr-defined]
    trained, held = ({row["text"] for row in parts[name]} for name in ("train", "held-out"))
    assert trained and held and not trained & held and len(trained | held) == len(REVIEWS)


@pytest.mark.parametrize(
    "objective",
    [
        "MaskedLM", {"type": "MaskedLM", "pairs": "nsp"}, "SequenceClassification", "TokenClassification",
        {"type": "MultipleChoice", "choices": 3},
    ],
)  # fmt: skip
def test_processes_share_the_batches_of_one(tmp_path: Path, objective: Any) -> None:
    rows = {"TokenClassification": CITIES, "SequenceClassification": REVIEWS}.get(str(objective), ASKED)
    corpus = texts(tmp_path) if "MaskedLM" in str(objective) else str(write(tmp_path / "rows.jsonl", rows))
    model = {**BERT, "architectures": ["BertForPreTraining"]}
    prepared, made, batch = begin(config(tmp_path / "out", corpus, objective, model=model))
    shares = [next(prepared.pipeline.batches(made, World(rank, 2, ALONE.device))) for rank in (0, 1)]
    for name in ("tokens", "targets", "segments", "types", "labels"):
        whole = getattr(batch, name, None)
        if whole is not None:
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), whole)


ROW = {"text": "a b c", "label": "x"}
CHOOSE = {"type": "MultipleChoice", "choices": 3}
BAD_ROWS: list[tuple[Any, Any, str]] = [
    ("SequenceClassification", [ROW, {"text": "b"}], r"rows.jsonl, line 2 has no label; give it 'label'"),
    ("SequenceClassification", [ROW, {"label": "x", "txt": "b"}], r"line 2 has no 'text'; did you mean 'txt'\?"),
    ("SequenceClassification", [ROW, {**ROW, "label": 0.5}], r"line 2: the label is 0.5; it must be a name"),
    ("SequenceClassification", [ROW, {**ROW, "text": ""}], r"line 2: 'text' is ''; it must be a text"),
    ("SequenceClassification", [ROW], r"of 1 rows none is left to train on"),
    ("SequenceClassification", [ROW, [1]], r"line 2 is no JSON object"),
    ({"type": "SequenceClassification", "labels": ["y", "z"]}, [ROW, ROW], r"line 1 has the label 'x', which obj"),
    ("TokenClassification", [{"tokens": ["a", "b"], "tags": ["O"]}] * 2, r"line 1 has 2 words, and needs a list of as"),
    ("TokenClassification", [{"tokens": "a b", "tags": ["O"]}] * 2, r"line 1: 'tokens' is 'a b'; it must be a list"),
    ("SpanExtraction", [{**ANSWERS[0], "answers": "Peter"}, ANSWERS[1]], r"line 1: answers are 'Peter'; write"),
    ("SpanExtraction", [{**ANSWERS[0], "context": "no one"}, ANSWERS[1]], r"the answer 'Peter Smith' does not stand"),
    ("MultipleChoice", ASKED, r"line 1 has 3 choices, but objective.choices is 4"),
    (CHOOSE, [ASKED[0], {**ASKED[1], "answer": 3}], r"line 2: the answer is 3; it must be one of the choices, or its"),
    (CHOOSE, [ASKED[0], {**ASKED[1], "answer": "no"}], r"line 2: the answer is 'no'; it must be one of the choices"),
    (CHOOSE, [ASKED[0], {**ASKED[1], "choices": "abc"}], r"line 2: 'choices' is 'abc'; it must be a list of texts"),
    (CHOOSE, [ASKED[0], {"context": "a", "choices": ["b"] * 3}], r"line 2 has no label; give it 'answer'"),
    (CHOOSE, [ASKED[0], {"contxt": "a"}], r"line 2 has no 'context'; did you mean 'contxt'\?"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "rows", "message"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, objective: Any, rows: list[Any], message: str) -> None:
    corpus = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        begin(config(tmp_path / "out", corpus, objective, data={"held_out": 0.0 if len(rows) > 1 else 0.2}))


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        ("MaskdLM", BERT, r"objective.type is 'MaskdLM'; did you mean 'maskedlm'\?; choose one of CausalLM, "),
        ("CausalLM", BERT, r"the objective CausalLM trains a decoder, but \[model\] is an encoder \(BertForMaskedLM\)"),
        ("MaskedLM", LLAMA, r"MaskedLM trains an encoder, but \[model\] is a decoder \(LlamaForCausalLM\)"),
        ("GenerativeFineTuning", BERT, r"GenerativeFineTuning trains a decoder, but \[model\] is an encoder"),
        ({"type": "MaskedLM", "pairs": "nsp"}, BERT, r"with pairs = 'nsp' needs a head 'pair', which BertForMaskedLM"),
        ({"type": "MaskedLM", "pairs": "cat"}, BERT, r"objective.pairs is 'cat'"),
        ({"type": "MaskedLM", "replaced": 0.9, "random": 0.2}, BERT, r"objective.replaced is 0.9 and objective.random"),
        ({"type": "SpanExtraction", "labels": ["a"]}, BERT, r"objective.labels are for classes"),
        ({"type": "MultipleChoice", "labels": ["a"]}, BERT, r"objective.labels are for classes"),
        ({"type": "MultipleChoice", "choices": 1}, BERT, r"objective.choices is 1; a question has at least 2"),
    ],
)
def test_objectives_and_models_that_do_not_fit(tmp_path: Path, objective: Any, model: Any, message: str) -> None:
    rows = str(write(tmp_path / "rows.jsonl", REVIEWS))
    bpe = {"kind": "bpe"} if objective == "CausalLM" else {}
    with pytest.raises(ValueError, match=message):
        begin(config(tmp_path / "out", rows, objective, model=model, tokenizer=bpe))


def test_labels_need_text_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the embedded corpus has no labels; name files of JSON lines or Parquet"):
        begin(config(tmp_path / "out", "embedded", "SequenceClassification"))


def test_every_objective_has_a_small_model_and_stands_in_the_help(tmp_path: Path) -> None:
    from landmark.cli.main import app

    shown = CliRunner().invoke(app, ["train", "--help"], terminal_width=200).stdout
    for cls in CONFIGS.values():
        if issubclass(cls, ObjectiveConfig):
            assert cls.type_name in shown
            hf = {"vocab_size": 400, "pad_token_id": 0, **cls().small()}
            with torch.device("meta"):
                assert cls().accept(landmark.build(hf))
