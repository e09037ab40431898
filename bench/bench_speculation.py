"""Speculation on a pair that is trained here: answers with a draft model and without, in one run, A B A B.

    python bench/bench_speculation.py [--quick] [--out runs/speculation] [--draft DIR] [--steps 120] [--rounds 3]
        [--prompts 4] [--tokens 96] [--json]

On the embedded corpus a draft of about 5 M parameters is trained as `landmark quickstart` does; the target, of 90 M,
grows from it (feed-forwards 32 times as wide, Chen et al. 2015: at first it computes the same) and is trained on. Both
stay under --out, so that a second call only measures, and one that was stopped goes on. What `landmark quickstart` has
made already is as good a draft: --draft runs/quickstart.
Prompts are beginnings of held-out text, batch 1, bfloat16. A row is one way to draft at one temperature: `speedup` is
the median of the times without and with the drafts, round by round; `acceptance` the share of guesses that were kept,
of those that were looked at; `mean` the tokens a call of the model, `formula` what (1 - a^(g+1)) / (1 - a) says of it
for guesses of one length g (`fixed` rows). Rows of the engine are one request after the other. `repeats` is prompt
lookup on code that is to be written a second time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pair import interleave, show

import landmark
from landmark.data.corpora import Corpus
from landmark.infer.engine import Engine, Request
from landmark.infer.generate import Event, generate
from landmark.infer.sampling import Sampling
from landmark.infer.speculative import Drafter, Figures, Lookup, ModelDrafter, expected_tokens, speculate
from landmark.models.decoder import Decoder
from landmark.quickstart import recipe
from landmark.train.config import Checkpoints, Evaluation
from landmark.train.optim import Muon
from landmark.train.prepare import Prepared
from landmark.train.progress import progress
from landmark.train.recipe import SMALL, TokenizerConfig, TrainConfig
from landmark.train.run import train

WIDER = 32  # times as many hidden units in the feed-forwards of the target
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def recipes(out: Path, drafter: Path, steps: int, quick: bool) -> tuple[TrainConfig, TrainConfig]:
    """Of the draft and of the target, whose updates are of as many tokens."""
    draft = recipe(drafter, 8 if quick else 900)
    target = recipe(out / "target", 8 if quick else steps, seed=1)
    if quick:
        draft = dataclasses.replace(draft, model=TINY)
    often = Checkpoints(every=25, keep=1)
    measured = Evaluation(every=None, batches=40)
    draft = dataclasses.replace(draft, checkpoints=often, evaluation=measured)
    return draft, dataclasses.replace(
        target, model=str(out / "grown"), checkpoints=often, evaluation=measured, optimizer=Muon.Config(lr=1e-3),
        tokenizer=TokenizerConfig(path=str(drafter)),
    )  # fmt: skip


@torch.no_grad()
def grow(small: Path, large: Path) -> None:
    """A model directory whose feed-forwards have more units, which do nothing yet (Net2Net, Chen et al. 2015)."""
    if (large / "config.json").exists():
        return
    body = json.loads((small / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(2)
    model = landmark.build(body | {"intermediate_size": WIDER * body["intermediate_size"]})
    old = landmark.load(small, dtype="float32").state_dict()
    for name, new in model.state_dict().items():
        if name.endswith("down.weight"):
            new.zero_()
        new[tuple(slice(0, n) for n in old[name].shape)] = old[name]
    landmark.save(model, large)


def trained(config: TrainConfig) -> Decoder:
    """The model of a finished run; of one that was stopped, what it becomes."""
    out = Path(config.out)
    done = out / "finished"
    if not done.exists():
        train(config, callbacks=[progress()], resume=(out / "checkpoints" / "LATEST").exists())
        done.touch()
    return opened(out)


def opened(folder: Path) -> Decoder:
    model = landmark.load(folder, dtype="bfloat16")
    assert isinstance(model, Decoder)
    return model.eval()


def held_out(config: TrainConfig, count: int, length: int) -> list[list[int]]:
    """Beginnings of passages of held-out text."""
    prepared = Prepared(config, Path(config.out))
    text = prepared.parts["held-out-0"][0]
    assert isinstance(text, Corpus)
    passages = [document.text for document in text if len(document.text) > 8 * length]
    step = max(1, len(passages) // count)
    return [prepared.tokenizer.encode(passage, special=True)[:length] for passage in passages[::step][:count]]


def twice(config: TrainConfig, count: int, length: int) -> list[list[int]]:
    """Passages of which all but the end has been repeated."""
    return [[*text, *text[: length // 8]] for text in held_out(config, count, length)]


def ways(draft: Decoder) -> Iterator[tuple[str, Callable[[], Drafter], int | None]]:
    yield "draft model", lambda: ModelDrafter(draft), None
    for length in (2, 4, 6):
        yield f"draft model, {length} fixed", lambda: ModelDrafter(draft), length


def alone(model: Decoder, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    return [generate(model, [prompt], sampling)[0].tokens for prompt in prompts]


def ahead(
    model: Decoder, prompts: list[list[int]], sampling: Sampling, make: Callable[[], Drafter], length: int | None,
    figures: Figures,
) -> list[list[int]]:  # fmt: skip
    def one(prompt: list[int]) -> list[int]:
        events: Iterator[Event] = speculate(model, [prompt], sampling, drafter=make(), length=length, figures=figures)
        return [event.token for event in events]

    return [one(prompt) for prompt in prompts]


def row(
    name: str, model: Decoder, prompts: list[list[int]], sampling: Sampling, make: Callable[[], Drafter],
    length: int | None, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    figures = Figures()
    said = ahead(model, prompts, sampling, make, length, figures)
    equal = ""
    if sampling.greedy:
        plain = alone(model, prompts, sampling)
        equal = f"{sum(a == b for x, y in zip(said, plain, strict=True) for a, b in zip(x, y, strict=True))}"
        equal += f"/{sum(map(len, plain))}"
    times = interleave(
        lambda: ahead(model, prompts, sampling, make, length, Figures()),
        lambda: alone(model, prompts, sampling),
        rounds,
    )
    tokens = len(prompts) * sampling.max_tokens
    calls = figures.calls - len(prompts)  # the first reads the prompt
    a = figures.acceptance
    return {
        "drafts": name, "temperature": sampling.temperature, "acceptance": a,
        "mean": (figures.tokens - len(prompts)) / max(1, calls),
        "formula": expected_tokens(a, length) if length else "",
        "plain_tokens_s": tokens / times["theirs_s"], "tokens_s": tokens / times["ours_s"],
        "speedup": times["speedup"], "min": times["speedup_min"], "max": times["speedup_max"], "equal": equal,
    }  # fmt: skip


def engine_row(
    name: str, model: Decoder, prompts: list[list[int]], sampling: Sampling, drafter: Any, rounds: int
) -> dict[str, Any]:
    def run(drafter: Any) -> tuple[Engine, list[list[int]]]:
        engine = Engine(model, memory=1 << 27, max_batch=4, prefixes=False, drafter=drafter)
        return engine, [engine.generate([Request(prompt=p, sampling=sampling)])[0][0].tokens for p in prompts]

    (engine, said), (_, plain) = run(drafter), run(None)
    equal = sum(a == b for x, y in zip(said, plain, strict=True) for a, b in zip(x, y, strict=True))
    times = interleave(lambda: run(drafter), lambda: run(None), rounds)
    stats, tokens = engine.stats(), sum(map(len, plain))
    calls = stats.steps - len(prompts)
    return {
        "drafts": name, "temperature": sampling.temperature, "acceptance": stats.kept / max(1, stats.proposed),
        "mean": (tokens - len(prompts)) / max(1, calls), "formula": "",
        "plain_tokens_s": tokens / times["theirs_s"], "tokens_s": tokens / times["ours_s"],
        "speedup": times["speedup"], "min": times["speedup_min"], "max": times["speedup_max"],
        "equal": f"{equal}/{tokens}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=None, help="default: runs/speculation, or with --quick a part of it"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models that have learned next to nothing: a look")
    parser.add_argument("--draft", type=Path, help="the directory of a model that drafts; default: one is trained")
    parser.add_argument("--steps", type=int, default=60, help="updates of the target, of 4,096 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    out = args.out or Path("runs/speculation") / ("quick" if args.quick else "")
    configs = recipes(out, args.draft or out / "draft", args.steps, args.quick)
    draft = opened(args.draft) if args.draft else trained(configs[0])
    grow(Path(configs[0].out), out / "grown")
    target = trained(configs[1])
    if args.train_only:
        return
    rounds, tokens, count = (1, 16, 2) if args.quick else (args.rounds, args.tokens, args.prompts)
    prompts, repeats = held_out(configs[0], count, 64), twice(configs[0], count, 160)
    rows = []
    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature=temperature, max_tokens=tokens, seed=0, stop_ids=())
        for name, make, length in ways(draft):
            rows.append(row(name, target, prompts, sampling, make, length, rounds))
        rows.append(row("lookup, repeats", target, repeats, sampling, Lookup, None, rounds))
        rows.append(engine_row("engine, draft model", target, prompts, sampling, draft, rounds))
        rows.append(engine_row("engine, lookup, repeats", target, repeats, sampling, "lookup", rounds))
    with torch.no_grad():
        sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (draft, target)]
    print(f"draft {sizes[0]:.1f} M, target {sizes[1]:.1f} M parameters, {torch.get_num_threads()} threads")
    show(rows, args.json)


if __name__ == "__main__":
    main()
