"""Decoding, prefill and memory beside llama.cpp, OpenVINO and transformers, on the same random weights, A B A B.

    python bench/bench_rivals.py [--install DIR] [--llama-python PATH] [--openvino-python PATH] [--files DIR]
        [--pairs int8/q8_0,...] [--measures decode,batch,prefill] [--rounds 5] [--quick] [--no-memory] [--json]

Every program is a process of its own (bench/rivals), with two threads, on weights of one shape (Llama-3.2-1B's) that
were drawn once; `--shape sparse` is a Mixtral of 0.8 billion, with eight experts of 1,792 in 16 layers of 1,024. Ours
and one rival are asked in turn; `ratio` is the median of ours / theirs in tokens/s, round by round, with its range.
`cosine` is that of the logits after one prompt: both must hold the same model.

decode   one sequence, 32 tokens after a prompt of 64
batch    eight sequences (llama.cpp: eight of its sequences in one batch), 16 tokens each after prompts of 64
prefill  one prompt of 512, up to its first token
memory   a fresh process that reads a prompt of 512 and writes 16 tokens: the most bytes that were resident, in it those
         of mapped files

Bits, of the layers' matrices / of the table of tokens, which is the head too (norms are 16 or 32 bits everywhere):
bf16/bf16          16 / 16 in all; keys and values are bfloat16 in ours and transformers, float16 in llama.cpp
bf16-11/bf16       11.2 / 11.2 in ours: the same numbers to the bit, in less memory; 16 / 16 in theirs
int8/q8_0          8.5 / 8.5 in both: 8 bits, and a float16 scale for 32 of them
int4-all/q4_0-all  4.5 / 4.5 in both: 4 bits, and a float16 scale for 32 of them
int4/q4_0          4.5 / 8.5 in ours, 4.5 / 6.6 (Q6_K) in llama.cpp: what either does where it is not told
-a8                what our weights multiply is rounded to 8 bits too, as in all coded formats of llama.cpp
transformers' model is called in a plain loop; `transformers.generate` is its own loop, less the reading of the prompt.
OpenVINO's GenAI reads llama.cpp's files: 16 bits as float16, 8 as 8.75 and 4 as 4.6, since it adds a zero point to each
group; its runtime keeps keys and values in 8 bits, and rounds activations too where weights are coded.

Rivals without an interpreter are left out, with a line that says so. --install DIR makes the interpreters: a virtual
environment each, llama.cpp built from source for this processor (some minutes); a later run with that DIR finds them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pair import show

RIVALS = Path(__file__).with_name("rivals")
PACKAGES = {"llama": ["llama-cpp-python", "gguf", "numpy"], "openvino": ["openvino", "openvino-genai", "numpy"]}
SLOTS, CAPACITY, CLOSE = 8, 640, 0.999
QUICK = {"sparse": "tiny-sparse"}


@dataclass(frozen=True)
class Pair:
    """What is compared: our way, a program, and its file."""

    ours: str
    rival: str
    theirs: str
    cosine: float  # less than this is another model; coded weights are rounded to other codes by either, in each layer

    @property
    def name(self) -> str:
        return f"{self.ours}/{self.theirs}"


PAIRS = (
    Pair("bf16", "llama.cpp", "bf16", CLOSE),
    Pair("bf16-11", "llama.cpp", "bf16", CLOSE),
    Pair("bf16", "transformers", "bf16", CLOSE),
    Pair("bf16-11", "transformers", "bf16", CLOSE),
    Pair("bf16", "transformers.generate", "bf16", CLOSE),
    Pair("bf16-11", "transformers.generate", "bf16", CLOSE),
    Pair("bf16", "openvino", "f16", CLOSE),
    Pair("bf16-11", "openvino", "f16", CLOSE),
    Pair("int8", "llama.cpp", "q8_0", 0.99),
    Pair("int8-a8", "llama.cpp", "q8_0", 0.99),
    Pair("int8-a8", "openvino", "q8_0", 0.99),
    Pair("int4-all", "llama.cpp", "q4_0-all", 0.9),
    Pair("int4-all-a8", "llama.cpp", "q4_0-all", 0.9),
    Pair("int4-all-a8", "openvino", "q4_0-all", 0.9),
    Pair("int4", "llama.cpp", "q4_0", 0.9),
    Pair("int4-a8", "llama.cpp", "q4_0", 0.9),
)
MEASURES: dict[str, tuple[int, int, int]] = {"decode": (1, 64, 32), "batch": (8, 64, 16), "prefill": (1, 512, 0)}


@dataclass(frozen=True)
class Places:
    """The interpreters that are there (None: leave it out) and where files lie."""

    files: Path
    llama: Path | None
    openvino: Path | None
    threads: int = 2

    def command(self, program: str, weights: str) -> list[str]:
        """A process that answers for these weights."""
        settings = [str(self.threads), str(SLOTS), str(CAPACITY)]
        interpreter, script, path = {
            "landmark": (Path(sys.executable), "landmark_worker.py", self.files / "hf" / weights),
            "transformers": (Path(sys.executable), "transformers_worker.py", self.files / "hf" / weights),
            "transformers.generate": (Path(sys.executable), "transformers_worker.py", self.files / "hf" / weights),
            "llama.cpp": (self.llama, "llama_worker.py", self.files / "gguf" / f"{weights}.gguf"),
            "openvino": (self.openvino, "openvino_worker.py", self.files / "openvino" / weights),
        }[program]
        own_loop = ["--generate"] if program == "transformers.generate" else []
        return [str(interpreter), str(RIVALS / script), str(path), *settings, *own_loop]

    def has(self, pair: Pair) -> bool:
        """OpenVINO reads files that llama.cpp made."""
        needs = {"llama.cpp": [self.llama], "openvino": [self.llama, self.openvino]}
        return None not in needs.get(pair.rival, [])


class Process:
    """A program that is asked and answers, a line each; its stderr is shown if it ends."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self.name, self._errors = " ".join(command[1:3]), tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self._answer()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **what}), file=self._process.stdin)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{said[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} logits beside {len(b)}: these are not one model")
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def agreement(ours: Process, theirs: Process, prompt: list[int]) -> float:
    """Cosine of the two programs' logits after a prompt."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for number, process in enumerate((ours, theirs)):
            file = Path(directory) / f"{number}.f32"
            process.ask("logits", prompt=prompt, file=str(file))
            found.append(array("f", file.read_bytes()))
    return cosine(*found)


def ids(draw: random.Random, vocab: int, count: int, length: int) -> list[list[int]]:
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


def speed(process: Process, prompts: list[list[int]], steps: int) -> float:
    """Tokens/s: of the `steps` that follow the prompts, or, without any, of reading them."""
    if steps == 0:
        return sum(map(len, prompts)) / float(process.ask("prefill", prompts=prompts)["seconds"])
    return len(prompts) * steps / float(process.ask("decode", prompts=prompts, steps=steps)["seconds"])


def compare(
    ours: Process, theirs: Process, measure: str, vocab: int, rounds: int, draw: random.Random
) -> dict[str, float]:
    """Rates in tokens/s, medians, and the ratio ours / theirs round by round; a first round is not counted."""
    count, length, steps = MEASURES[measure]
    rates: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        prompts = ids(draw, vocab, count, length)
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        found = {process: speed(process, prompts, steps) for process in (first, second)}
        if number:
            rates.append((found[ours], found[theirs]))
    return summary(rates)


def summary(rates: Sequence[tuple[float, float]]) -> dict[str, float]:
    ratios = [a / b for a, b in rates]
    return {
        "ours_tokens_s": statistics.median(a for a, _ in rates),
        "theirs_tokens_s": statistics.median(b for _, b in rates),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def measured(places: Places, pair: Pair, measures: Sequence[str], vocab: int, rounds: int) -> list[dict[str, Any]]:
    """A row a measure. Raises RuntimeError where the two do not hold one model."""
    draw, threads = random.Random(0), places.threads
    with (
        Process(places.command("landmark", pair.ours), threads) as ours,
        Process(places.command(pair.rival, pair.theirs), threads) as theirs,
    ):
        alike = agreement(ours, theirs, ids(draw, vocab, 1, 64)[0])
        if alike < pair.cosine:
            raise RuntimeError(f"{pair.name} beside {pair.rival}: the logits' cosine is {alike:.4f}, not {pair.cosine}")
        head = {"rival": pair.rival, "bits": pair.name, "cosine": alike}
        rows = []
        for m in measures:
            rows.append(head | {"measure": m} | compare(ours, theirs, m, vocab, rounds, draw))
            row = rows[-1]
            speeds = f"{row['ours_tokens_s']:.4g} / {row['theirs_tokens_s']:.4g} tokens/s, {row['ratio']:.3g}"
            print(f"{pair.rival} {pair.name} {m}: {speeds}", file=sys.stderr)
        return rows


def memory(places: Places, program: str, weights: str, vocab: int) -> dict[str, Any]:
    with Process(places.command(program, weights), places.threads) as process:
        process.ask("decode", prompts=ids(random.Random(0), vocab, 1, 512), steps=16)
        said = process.ask("memory")
    mib = {name: round(said[key] / 2**20) for name, key in (("peak_MiB", "peak"), ("of_files_MiB", "files"))}
    return {"program": program, "weights": weights, **mib}


def prepare(places: Places, shape: str, pairs: Sequence[Pair]) -> int:
    """Make the files that are not there yet -> the vocabulary's size."""
    places.files.mkdir(parents=True, exist_ok=True)
    hf, gguf = places.files / "hf", places.files / "gguf"

    def make(interpreter: Path, script: str, *arguments: str | Path) -> None:
        command = [str(interpreter), str(RIVALS / script), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")

    hf.mkdir(exist_ok=True)
    make(Path(sys.executable), "landmark_files.py", shape, hf, *wanted(p.ours for p in pairs if p.ours != "bf16"))
    if places.llama is not None:
        gguf.mkdir(exist_ok=True)
        formats = wanted(p.theirs for p in pairs if not p.rival.startswith("transformers"))
        make(places.llama, "llama_files.py", hf / "bf16", gguf, *formats)
    if places.openvino is not None:
        formats = wanted(p.theirs for p in pairs if p.rival == "openvino")
        make(places.openvino, "openvino_files.py", gguf, places.files / "openvino", *formats)
    config: dict[str, Any] = json.loads((hf / "bf16" / "config.json").read_text())
    return int(config["vocab_size"])


def wanted(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def install(directory: Path, rival: str) -> Path:
    """The interpreter of a virtual environment with the rival's packages, made where it is not there."""
    home = directory / rival
    interpreter = home / "bin" / "python"
    if not (home / ".ready").exists():
        print(f"installing {', '.join(PACKAGES[rival])} in {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        source = ["--no-binary", "llama-cpp-python"] if rival == "llama" else []
        flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        command = [str(interpreter), "-m", "pip", "install", "-q", *source, *PACKAGES[rival]]
        subprocess.run(command, check=True, env=os.environ | flags)
        (home / ".ready").touch()
    return interpreter


@contextmanager
def folder(given: Path | None) -> Iterator[Path]:
    """The one that is given, or one that is gone afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def chosen(names: str | None) -> list[Pair]:
    """Pairs by name or rival. Raises ValueError for one that is not there."""
    if names is None:
        return list(PAIRS)
    for name in names.split(","):
        if not any(name in (pair.name, pair.rival) for pair in PAIRS):
            known = wanted(word for pair in PAIRS for word in (pair.rival, pair.name))
            raise ValueError(f"there is no pair or rival {name!r}; choose of {', '.join(known)}")
    return [pair for pair in PAIRS if {pair.name, pair.rival} & set(names.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="DIR", help="make the rivals' interpreters there, once")
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama_cpp and gguf")
    parser.add_argument("--openvino-python", type=Path, help="an interpreter that has openvino and openvino_genai")
    parser.add_argument("--files", type=Path, help="keep weights there for a later run (about 18 GB; default: do not)")
    parser.add_argument("--pairs", help="rivals or pairs of bits, by commas; default: all")
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument(
        "--shape", default="llama3.2-1b", help="a published size of a Llama, or `sparse`: a small Mixtral"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measures = options.measures.split(",")
    if unknown := set(measures) - set(MEASURES):
        parser.error(f"unknown measures {', '.join(sorted(unknown))}; choose of {', '.join(MEASURES)}")
    try:
        pairs = chosen(options.pairs)
    except ValueError as error:
        parser.error(str(error))
    llama, openvino = options.llama_python, options.openvino_python
    if options.install is not None:
        llama = llama or install(options.install.resolve(), "llama")
        openvino = openvino or install(options.install.resolve(), "openvino")
    with folder(options.files) as files:
        places = Places(files.resolve(), llama, openvino, options.threads)
        for rival in wanted(pair.rival for pair in pairs if not places.has(pair)):
            print(f"{rival} is left out: no interpreter has it; see --install", file=sys.stderr)
        pairs = [pair for pair in pairs if places.has(pair)]
        if not pairs:
            parser.error("no rival is left to compare with")
        vocab = prepare(places, QUICK.get(options.shape, "tiny") if options.quick else options.shape, pairs)
        rows = [row for pair in pairs for row in measured(places, pair, measures, vocab, options.rounds)]
        sizes = []
        if not options.no_memory:
            programs = [each for p in pairs for each in (("landmark", p.ours), (p.rival, p.theirs))]
            sizes = [memory(places, program, weights, vocab) for program, weights in dict.fromkeys(programs)]
    if options.json:
        print(json.dumps({"speed": rows, "memory": sizes}, indent=2))
        return
    show([row | {"cosine": f"{row['cosine']:.5f}"} for row in rows], False)
    if sizes:
        show(sizes, False)


if __name__ == "__main__":
    main()
