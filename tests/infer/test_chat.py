from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import landmark
from landmark.cli import chat as command
from landmark.cli.main import app
from landmark.infer.chat import Conversation, end_of_turn, prompt_ids
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.infer.session import Session
from landmark.models.decoder import Decoder
from landmark.terminal import printable
from landmark.weights.tokenizer import Tokenizer

from .models import LLAMA, MARIAN, build, tokenizer

GREEDY = Sampling(temperature=0, max_tokens=10)


def model(context: int = 512) -> Decoder:
    built: Decoder = build(LLAMA | {"vocab_size": tokenizer().vocab_size, "max_position_embeddings": context})
    return built


def base() -> Tokenizer:
    """The same without a chat template."""
    return Tokenizer(tokenizer().backend, tokenizer().special_tokens)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    landmark.save(model(256), path)
    tokenizer().save(path)
    return path


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in each call of the model."""
    counts: list[int] = []
    extend = Session.extend

    def counting(self: Session, tokens: Any) -> Any:
        counts.append(sum(map(len, tokens)))
        return extend(self, tokens)

    monkeypatch.setattr(Session, "extend", counting)
    return counts


def test_answers_as_if_each_turn_were_read_anew(extended: list[int]) -> None:
    """Three turns equal `generate` on the rendered conversation; only what is new is read."""
    tok, talk = tokenizer(), Conversation(model(), tokenizer(), GREEDY, system="Be brief.")
    known = 0
    for text in ("What is a list?", "And a dict?", "Thanks."):
        before = list(talk.messages)
        extended.clear()
        said = "".join(event.text for event in talk.reply(text))
        read = extended[0]
        prompt = tok.encode_chat(
            [{"role": "system", "content": "Be brief."}, *before, {"role": "user", "content": text}]
        )
        want = generate(
            talk.model, [prompt], Sampling(temperature=0, max_tokens=10, stop_ids=(tok.eos_id, *end_of_turn(tok))),
            tokenizer=tok,
        )[0]  # fmt: skip
        assert said == want.text == talk.messages[-1]["content"]
        assert 0 < read <= len(prompt) - known  # at least the last prompt is known, and the answer if it encodes back
        known = len(prompt)
    talk.reset()
    assert talk.messages == [] and talk.system == "Be brief."
    assert "".join(e.text for e in talk.reply("What is a list?")) != ""


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_went() -> None:
    talk, whole = (Conversation(model(), tokenizer(), GREEDY) for _ in range(2))
    full = [event.text for event in whole.reply("Hello")]
    answer = talk.reply("Hello")
    part = [next(answer).text for _ in range(4)]
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(part)} and part == full[:4]
    fresh = Conversation(model(), tokenizer(), GREEDY, messages=[dict(m) for m in talk.messages])
    assert [e.token for e in talk.reply("Go on")] == [e.token for e in fresh.reply("Go on")]


def test_an_interrupt_in_the_middle_of_a_step_costs_the_session_only(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model(), tokenizer(), GREEDY)
    list(talk.reply("Hello"))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(talk.reply("More"))
    fresh = Conversation(model(), tokenizer(), GREEDY, messages=[dict(m) for m in talk.messages])
    assert [e.token for e in talk.reply("Again")] == [e.token for e in fresh.reply("Again")]


def test_the_oldest_messages_leave_a_full_context() -> None:
    talk = Conversation(model(96), tokenizer(), GREEDY, system="Be brief.")
    for _ in range(6):
        list(talk.reply("Tell me more about it."))
    assert talk.forgotten > 0 and talk.messages[0]["role"] == "user"
    assert len(tokenizer().encode_chat([{"role": "system", "content": "Be brief."}, *talk.messages])) < 110
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens, longer than the model's context of 96"):
        talk.reply("word " * 200)
    assert talk.messages == []


def test_without_a_template_the_text_goes_on() -> None:
    tok, talk = base(), Conversation(model(), base(), GREEDY)
    assert not talk.templated
    first = "".join(event.text for event in talk.reply("import os"))
    assert first == generate(talk.model, [prompt_ids(tok, "import os")], GREEDY, tokenizer=tok)[0].text
    second = "".join(event.text for event in talk.reply("def f"))
    text = f"import os{first}\ndef f"
    assert second == generate(talk.model, [prompt_ids(tok, text)], GREEDY, tokenizer=tok)[0].text


def test_end_of_turn_and_beginning_of_text() -> None:
    tok = tokenizer()
    assert end_of_turn(tok) == [tok.token_to_id("<|im_end|>")]
    assert prompt_ids(tok, "x") == tok.encode("x", special=True)
    assert prompt_ids(tok, "x")[0] == tok.bos_id


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    talk = Conversation(model(), tokenizer(), GREEDY)
    reply = talk.reply

    def interrupting(text: str) -> Iterator[Any]:
        for n, event in enumerate(reply(text)):
            if n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(talk, "reply", interrupting)
    command.answer(Console(file=out, force_terminal=True, width=200, color_system=None), talk, "Hello")
    assert "4 tokens" in out.getvalue() and "stopped" in out.getvalue()
    assert signal.getsignal(signal.SIGINT) is before
    assert talk.messages[-1]["role"] == "assistant"


def test_the_terminal(directory: Path, tmp_path: Path) -> None:
    """The program itself, its input piped in."""
    lines = [
        "Hello", "two \\", "lines", "/nonsense", "/system Be [bold].", "/help", "Hi", f"/save {tmp_path / 'talk.json'}",
        f"/save {tmp_path / 'talk.json'}", "/save", "/reset", "/exit", "never said",
    ]  # fmt: skip
    arguments = [sys.executable, "-m", "landmark.cli.main", "chat", str(directory), "--max-tokens", "5", "--seed", "1"]
    done = subprocess.run(arguments, input="\n".join(lines), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for part in ("/nonsense is no command", "/system [TEXT]", "2 messages in", "exists; give a new", "needs a name"):
        assert part in " ".join(done.stdout.split())  # paths are long, and lines break
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[:2] == [{"role": "system", "content": "Be [bold]."}, {"role": "user", "content": "Hi"}]
    assert len(messages) == 3
    assert "no chat template" not in done.stdout


@pytest.mark.parametrize(
    ("variables", "sign"), [({}, "\033[1;36m"), ({"NO_COLOR": "1"}, "> "), ({"TERM": "dumb"}, "> ")]
)
def test_the_prompt_heeds_what_the_terminal_is(
    variables: dict[str, str], sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    environment = {"TERM": "xterm-256color"} | variables
    console = Console(file=io.StringIO(), force_terminal=True, _environ=environment)
    assert list(command.read(console)) == [] and sign in asked[0] and ("\033" in asked[0]) == (sign != "> ")


def test_a_base_model_says_so(tmp_path: Path) -> None:
    landmark.save(model(), tmp_path)
    base().save(tmp_path)
    result = CliRunner().invoke(app, ["chat", str(tmp_path), "--max-tokens", "3"], input="import os\n")
    assert result.exit_code == 0 and "no chat template: it continues your text" in result.output


def generate_json(directory: Path, *arguments: str, text: str | None = None) -> Any:
    result = CliRunner().invoke(app, ["generate", str(directory), "--json", *arguments], input=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_command(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("import os\nThe with statement\n")
    common = ("--temperature", "0.7", "--seed", "3", "--max-tokens", "8")
    out = generate_json(directory, "import os", "--prompt", "The with statement", *common)
    assert [a["prompt"] for a in out["answers"]] == ["import os", "The with statement"]
    assert out["tokens"] == sum(len(a["tokens"]) for a in out["answers"])
    strip = lambda report: [(a["prompt"], a["text"]) for a in report["answers"]]
    assert strip(generate_json(directory, "--file", str(path), "--lines", *common)) == strip(out)
    assert strip(generate_json(directory, "--lines", *common, text=path.read_text())) == strip(out)
    assert [a["prompt"] for a in generate_json(directory, *common, text="import os\n\nx\n")["answers"]] == [
        "import os\n\nx"
    ]
    plain = CliRunner().invoke(app, ["generate", str(directory), "import os", *common])
    assert plain.stdout == printable(out["answers"][0]["text"]) + "\n"
    flowing = CliRunner().invoke(app, ["generate", str(directory), "import os", "--stream", *common])
    assert flowing.stdout == plain.stdout
    samples = generate_json(directory, "import os", "--samples", "3", *common)["answers"]
    assert [a["seed"] for a in samples] == [3, 4, 5] and len({a["text"] for a in samples}) == 3
    best = generate_json(directory, "import os", "--beams", "3", "--max-tokens", "6")["answers"][0]
    assert len(best["others"]) == 2 and best["score"] >= best["others"][0]["score"]
    ended = generate_json(directory, "import os", "--stop", "".join(samples[0]["text"][2:4]), *common)["answers"][0]
    assert ended["finish"] == "stop" and samples[0]["text"].startswith(ended["text"])


def test_generate_reads_sources_for_an_encoder_decoder(tmp_path: Path) -> None:
    landmark.save(build(MARIAN | {"vocab_size": tokenizer().vocab_size, "pad_token_id": 2}), tmp_path)
    tokenizer().save(tmp_path)
    out = generate_json(tmp_path, "Hello", "--temperature", "0", "--max-tokens", "6")
    assert len(out["answers"][0]["tokens"]) <= 6
    result = CliRunner().invoke(app, ["chat", str(tmp_path)], input="x\n")
    assert isinstance(result.exception, ValueError) and "does not chat" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x " * 400], "longer than the model's context of 256"),
        (["x", "--top-p", "2"], "top_p is 2.0; it must be above 0"),
        (["x", "--beams", "2", "--samples", "2"], "give one of them"),
        (["x", "--beams", "2", "--top-k", "5"], "--top-k is for drawing"),
        (["x", "y", "--stream"], "--stream prints one answer"),
        (["x", "--dtype", "f7"], "unknown dtype 'f7'"),
    ],
)
def test_bad_input(directory: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(directory), *arguments])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_no_prompt(directory: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(directory)], input="\n")
    assert isinstance(result.exception, ValueError) and "the prompt is empty" in str(result.exception)


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b\n\tc é") == "a[31mb\n\tc é"
