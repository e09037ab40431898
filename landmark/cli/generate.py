"""`landmark generate`: continue prompts, or translate them with an encoder-decoder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal import printable, read_input

if TYPE_CHECKING:
    from ..infer.sampling import Sampling
    from ..infer.speculative import Drafter
    from ..models.decoder import Decoder
    from ..models.encoder_decoder import EncoderDecoder
    from ..weights.tokenizer import Tokenizer

# Shared with `landmark chat`. What is left out is as the model's own generation_config.json says.
Model = Annotated[str, typer.Argument(help="Model directory or hub id.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the most likely tokens with this much probability.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens at least this likely, relative to the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: less of what was said or read before.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Subtracted from tokens of the answer, once.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Subtracted from tokens of the answer, each time.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")]
Quantise = Annotated[
    str | None,
    typer.Option(
        help="Round the weights as they are loaded: int8, int4, int4-all, or one with -a8. bf16-11 rounds nothing: "
        "bfloat16 in 11 bits."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Adapter = Annotated[str | None, typer.Option(help="A LoRA directory or hub id, in PEFT's format.")]


def generate(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; none: standard input is one.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One more prompt; may be given several times.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A text file that is a prompt.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Every line of files and standard input is a prompt.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt, with seeds that count up.")] = 1,
    beams: Annotated[int, typer.Option(min=0, help="Search with so many beams instead of drawing.")] = 0,
    length_penalty: Annotated[float, typer.Option(help="Of the beam search (Wu et al. 2016).")] = 0.6,
    stream: Annotated[
        bool | None, typer.Option(help="Print tokens as they come; default: on a terminal, for one answer.")
    ] = None,
    dtype: Dtype = None,
    quantise: Quantise = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Speculate: a smaller model of the same vocabulary, own (drafts), or lookup (in the text so far)."
        ),
    ] = None,
    device: Device = "cpu",
    adapter: Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option(help="A JSON-lines file: a prompt or messages a line, with settings of its own if it likes."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers to --batch go.")] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="For what --batch remembers of its texts, in GB.")] = 1.0,
    at_once: Annotated[int, typer.Option(min=1, help="Answers of --batch that are written side by side.")] = 64,
) -> None:
    """Continue prompts with a language model, or answer sources with an encoder-decoder.

    landmark generate runs/quickstart "import os" --temperature 0.7

    landmark generate runs/quickstart --batch prompts.jsonl --output answers.jsonl
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "stop": tuple(stop) if stop else None,
    }  # fmt: skip
    if batch is not None:
        if text or prompt or file or lines or samples > 1 or beams or stream:
            raise ValueError('--batch takes its prompts from its file, and "n" from its lines; give nothing else')
        if output is None:
            raise ValueError("--batch needs --output, where its answers go")
        loading = {"dtype": dtype, "device": device, "quantise": quantise, "adapter": adapter}
        _answer_file(model, batch, output, settings, int(memory * 1e9), at_once, draft, loading, as_json)
        return
    if output is not None:
        raise ValueError("--output is for the answers to --batch; without it they go to standard output")
    prompts = read_prompts([*(text or ()), *(prompt or ())], file or [], lines)
    if beams and samples > 1:
        raise ValueError("--samples draws answers and --beams searches for the best; give one of them")
    if beams and draft is not None:
        raise ValueError("--draft is for drawing and --beams searches for the best; leave out one of them")
    drawing = [name for name in ("temperature", "top_k", "top_p", "min_p", "seed") if settings[name] is not None]
    if beams and drawing:
        option = "--" + drawing[0].replace("_", "-")
        raise ValueError(f"{option} is for drawing and --beams searches for the best; leave out one of them")
    loaded, tokenizer = open_model(model, dtype, device, quantise, adapter)
    from ..infer.defaults import recommended

    sampling = recommended(loaded, **settings)
    terminal = sys.stdout.isatty()
    flowing = not as_json and not beams and len(prompts) * samples == 1
    flowing = flowing and (terminal if stream is None else stream)
    if stream and not flowing:
        raise ValueError("--stream prints one answer as it comes; leave out --json, --beams and further prompts")
    began = time.perf_counter()
    if beams:
        answers = _search(loaded, tokenizer, prompts, beams, length_penalty, sampling)
    else:
        answers = _draw(loaded, tokenizer, prompts, samples, sampling, draft, echo=terminal, flowing=flowing)
    seconds, count = time.perf_counter() - began, sum(len(answer["tokens"]) for answer in answers)
    if as_json:
        report = {"model": model, "answers": answers, "tokens": count, "seconds": round(seconds, 4)}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if not flowing:
        for answer in answers:
            _heading(answer["prompt"] if terminal else "")
            print(printable(answer["text"]))
    if terminal:
        _dim(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")


def _answer_file(
    spec: str, source: Path, target: Path, settings: dict[str, Any], memory: int, at_once: int, draft: str | None,
    loading: dict[str, Any], as_json: bool,
) -> None:  # fmt: skip
    """`--batch`: with a bar, the rate and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..infer.batch import Progress as State
    from ..infer.batch import answer_file, check_target, read_lines
    from ..infer.defaults import recommended
    from ..infer.engine import Engine
    from ..models.base import kind
    from ..models.decoder import Decoder
    from .serve import open_draft

    read_lines(source)  # before a model is loaded for them
    check_target(target)
    model, tokenizer = open_model(spec, **loading)
    if not isinstance(model, Decoder):
        raise ValueError(f"{spec} is {kind(model)}; --batch serves decoders")
    drafter = None if draft is None else open_draft(draft, loading["dtype"], loading["device"])
    engine = Engine(model, tokenizer, memory=memory, max_batch=at_once, drafter=drafter)
    began = time.perf_counter()
    bar = Progress(
        TextColumn("answers"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    task = bar.add_task("", total=None, rate="")

    def report(state: State) -> None:
        bar.start()  # now that nothing is wrong with the files
        rate = f"{state.tokens / (time.perf_counter() - began):,.0f} tokens/s"
        bar.update(task, total=state.total, completed=state.done, rate=rate)

    key = f"{spec} {loading} {_files_of(spec)} {_files_of(loading['adapter'])}"
    try:
        done = answer_file(engine, source, target, recommended(model, **settings), key=key, report=report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what is answered is kept, and the same command goes on") from None
    finally:
        if bar.live.is_started:
            bar.stop()
    seconds = time.perf_counter() - began
    figures = {"output": str(target), "lines": done.total, "failed": done.failed, "tokens": done.tokens}
    if as_json:
        print(json.dumps({**figures, "seconds": round(seconds, 4)}, indent=2))
    else:
        print(f"{target}: {done.total} lines, {done.failed} failed; {done.tokens} tokens in {seconds:.1f} s")
    if done.failed == done.total:
        raise typer.Exit(1)


def _files_of(spec: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the weights in a directory: others are another model, under whatever name."""
    from ..weights.checkpoint import locate

    files = [] if spec is None else sorted(locate(spec).glob("*.safetensors"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def read_prompts(given: list[str], files: list[Path], lines: bool) -> list[str]:
    """What the command line, files and standard input (if there is nothing else) hold."""
    from ..weights.files import read_text

    texts = [read_text(path) for path in files]
    if not given and not files:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt; give one, or --file, or pipe one in")
        texts = [read_input()]
    texts = [part for text in texts for part in (text.split("\n") if lines else [text.removesuffix("\n")])]
    prompts = [*given, *(part for part in texts if part)]
    if not prompts:
        raise ValueError("the prompt is empty; give some text")
    return prompts


def open_model(
    spec: str, dtype: str | None, device: str, quantise: str | None = None, adapter: str | None = None
) -> tuple[Decoder | EncoderDecoder, Tokenizer]:
    """A generating model and its tokenizer."""
    import landmark

    from ..models.base import kind
    from ..models.decoder import Decoder
    from ..models.encoder_decoder import EncoderDecoder
    from ..weights.checkpoint import locate
    from ..weights.tokenizer import Tokenizer

    directory = locate(spec)
    model = landmark.load(directory, dtype=dtype, device=device)
    if not isinstance(model, Decoder | EncoderDecoder):
        raise ValueError(f"{spec} is {kind(model)}, which does not generate; give a decoder")
    if quantise is not None:
        from ..transforms.quantise import quantised

        rounded = quantised(model, quantise)
        assert isinstance(rounded, Decoder | EncoderDecoder)
        model = rounded
    if adapter is not None:
        from ..transforms.lora import attach, read_adapter

        attach(model, {adapter: read_adapter(adapter, model)}).choose(adapter)
    return model, Tokenizer.load(directory)


def only_decoder(model: Decoder | EncoderDecoder) -> Decoder:
    """Raises ValueError for an encoder-decoder."""
    from ..models.base import kind
    from ..models.decoder import Decoder

    if not isinstance(model, Decoder):
        raise ValueError(f"{kind(model)} cannot speculate; leave --draft out")
    return model


def open_drafter(spec: str) -> Drafter:
    """Prompt lookup, the model's own drafts, or a model that drafts."""
    import landmark

    from ..infer.speculative import Lookup, ModelDrafter, OwnDrafts
    from ..models.base import kind
    from ..models.decoder import Decoder

    if spec == "lookup":
        return Lookup()
    if spec == "own":
        return OwnDrafts()
    model = landmark.load(spec)
    if not isinstance(model, Decoder):
        raise ValueError(f"{spec} is {kind(model)}, which cannot draft; give a decoder")
    return ModelDrafter(model)


def _encode(model: Decoder | EncoderDecoder, tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    from ..infer.chat import prompt_ids
    from ..models.encoder_decoder import EncoderDecoder

    if isinstance(model, EncoderDecoder):
        return [tokenizer.encode(prompt, special=True) for prompt in prompts]
    return [prompt_ids(tokenizer, prompt) for prompt in prompts]


def _draw(
    model: Decoder | EncoderDecoder, tokenizer: Tokenizer, prompts: list[str], samples: int, sampling: Sampling,
    draft: str | None, *, echo: bool, flowing: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    from dataclasses import replace

    from ..infer.generate import stream
    from ..infer.speculative import speculate

    seeds = [None if sampling.seed is None else sampling.seed + n for n in range(samples)]
    settings = [replace(sampling, seed=seed) for _ in prompts for seed in seeds]
    ids = [row for row in _encode(model, tokenizer, prompts) for _ in seeds]
    answers: list[dict[str, Any]] = [
        {"prompt": prompt, "text": "", "tokens": [], "finish": "length", "seed": seed}
        for prompt in prompts for seed in seeds
    ]  # fmt: skip
    if flowing:
        _heading(prompts[0] if echo else "")
    events = stream(model, ids, settings, tokenizer=tokenizer)
    if draft is not None:
        events = speculate(only_decoder(model), ids, settings, drafter=open_drafter(draft), tokenizer=tokenizer)
    for event in events:
        answer = answers[event.index]
        answer["text"] += event.text
        answer["tokens"].append(event.token)
        answer["finish"] = event.finish
        if flowing:
            print(printable(event.text), end="\n" if event.finish else "", flush=True)
    return answers


def _search(
    model: Decoder | EncoderDecoder, tokenizer: Tokenizer, prompts: list[str], width: int, length_penalty: float,
    sampling: Sampling,
) -> list[dict[str, Any]]:  # fmt: skip
    from ..infer.beam import Beams, beam_search

    beams = Beams(width=width, n_best=width, length_penalty=length_penalty, max_tokens=sampling.max_tokens)
    answers = []
    ids = _encode(model, tokenizer, prompts)
    for prompt, found in zip(prompts, beam_search(model, ids, beams, tokenizer=tokenizer), strict=True):
        best, *others = found
        answer = {"prompt": prompt, "text": best.text, "tokens": best.tokens, "finish": best.finish}
        rest = [{"text": h.text, "score": h.score, "logprob": h.logprob} for h in others]
        answers.append({**answer, "score": best.score, "logprob": best.logprob, "others": rest})
    return answers


def _heading(prompt: str) -> None:
    """The prompt, before what continues it."""
    if prompt:
        _dim(printable(prompt), end="")


def _dim(text: str, end: str = "\n") -> None:
    from rich.console import Console

    Console(highlight=False).print(text, style="dim", end=end, markup=False, soft_wrap=True)
