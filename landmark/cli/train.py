"""`landmark train`: a run from its TOML file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..models.base import Model
    from ..train import TrainConfig
    from ..weights.tokenizer import Tokenizer


def train(
    config: Annotated[Path, typer.Argument(help="The run, as a TOML file.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: optimizer.lr=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a model. The smallest run.toml has two lines: out = "runs/first" and steps = 500.

    What to learn is [objective] type = "...": CausalLM (the default), MaskedLM, Seq2Seq, SequenceClassification,
    TokenClassification, SpanExtraction, MultipleChoice, GenerativeFineTuning or MultiToken. The published recipes are
    in examples/.

    Several processes on this machine: torchrun --nproc-per-node 2 -m landmark.cli.main train run.toml
    """
    from ..train import Interrupted, TrainConfig
    from ..train import train as run_training
    from ..train.progress import progress
    from ..train.read import override, parse, read_toml

    settings = parse(TrainConfig, override(read_toml(config), assignments or []))
    callbacks = [] if as_json else [progress()]
    try:
        run = run_training(settings, callbacks=callbacks, sample=_sample(settings), resume=resume)
    except Interrupted as stop:
        again = ["landmark", "train", str(config), *(x for a in assignments or [] for x in ("--set", a)), "--resume"]
        raise Interrupted(f"{stop}; go on with: {shlex.join(again)}") from None
    if not run.world.first:
        return
    held_out = run.evaluated[1] if run.evaluated else None
    if as_json:
        print(json.dumps({"out": str(run.out), "step": run.step, "tokens": run.tokens, "held_out": held_out}))
    else:
        use = "generate" if settings.objective.writes else "inspect"
        print(f"The model is in {run.out}. Next: landmark {use} {shlex.quote(str(run.out))}")


def _sample(settings: TrainConfig) -> Callable[[Model, Tokenizer], list[str]] | None:
    """What the model writes after the prompts of [evaluation], the same draw every time."""
    from ..infer.chat import prompt_ids
    from ..infer.generate import generate
    from ..infer.sampling import Sampling
    from ..models.decoder import Decoder
    from ..models.encoder_decoder import EncoderDecoder

    prompts = settings.evaluation.prompts
    if prompts and not settings.objective.writes:
        name = settings.objective.type_name
        raise ValueError(f"evaluation.prompts are for models that write; leave them out with the objective {name}")
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=0, max_tokens=settings.evaluation.tokens)

    def sample(model: Model, tokenizer: Tokenizer) -> list[str]:
        assert isinstance(model, Decoder | EncoderDecoder)
        pairs = isinstance(model, EncoderDecoder)
        ids = [tokenizer.encode(p, special=True) if pairs else prompt_ids(tokenizer, p) for p in prompts]
        answers = generate(model, ids, sampling, tokenizer=tokenizer)
        return [p + (" → " if pairs else "") + (a.text or "") for p, a in zip(prompts, answers, strict=True)]

    return sample if prompts else None
