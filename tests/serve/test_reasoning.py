"""What is thought before an answer: told apart, streamed and whole alike, however the text is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

import landmark
from landmark.infer.engine import Engine, Event
from landmark.models.decoder import Decoder
from landmark.serve.answers import ChatChoice
from landmark.serve.reasoning import ReasoningReader
from landmark.serve.schema import ChatRequest
from landmark.serve.served import Served
from landmark.weights.tokenizer import Tokenizer

from .conftest import SIZE, live, model_and_tokenizer
from .test_api import HELLO, TOOLS

CASES: list[tuple[bool, str, str, str]] = [
    (False, "<think>\nWell, a < b.\n</think>\n\nYes.", "Well, a < b.", "Yes."),
    (False, "\n<think>so</think>  ok\n", "so", "  ok\n"),
    (True, "Well.\n</think>\n\nYes </think> no", "Well.", "Yes </think> no"),
    (True, "<think>\nWell\n\nand</thi</think>Yes", "Well\n\nand</thi", "Yes"),
    (True, "Well, and", "Well, and", ""),
    (False, "<think>cut off </thin", "cut off </thin", ""),
    (False, "<think>\n\n</think>\n\nYes", "", "Yes"),
    (False, "\n<thin", "", "\n<thin"),
    (True, "<thin", "<thin", ""),
    (False, "No <think>at the head</think>", "", "No <think>at the head</think>"),
    (False, "  plain\n", "", "  plain\n"),
]


def read(opened: bool, pieces: list[str]) -> tuple[str, str]:
    reader = ReasoningReader(opened)
    parts = [reader.feed(piece) for piece in pieces] + [reader.finish()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_whole_and_letter_by_letter(case: tuple[bool, str, str, str]) -> None:
    opened, text, thought, answer = case
    assert read(opened, [text]) == read(opened, list(text)) == (thought, answer)


@given(st.booleans(), st.text(alphabet="<think>/ \n", max_size=50), st.lists(st.integers(0, 50), max_size=5))
def test_cuts_change_nothing(opened: bool, text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    assert read(opened, [text[a:b] for a, b in pairwise(ends)]) == read(opened, [text])


OPENS = "{% for message in messages %}{{ message.content }}{% endfor %}<|im_start|>assistant\n<think>\n"


def served(special: bool, template: str | None = None, **options: Any) -> Served:
    """A model with tokens for the marks."""
    _, plain = model_and_tokenizer()
    tokenizer = Tokenizer(Backend.from_str(plain.backend.to_str()), plain.special_tokens, plain.chat_templates)
    marks = [AddedToken(mark, special=special, normalized=False) for mark in ("<think>", "</think>")]
    assert (tokenizer.backend.add_special_tokens if special else tokenizer.backend.add_tokens)(marks) == 2
    tokenizer.chat_template = template or tokenizer.chat_template or ""
    torch.manual_seed(0)
    model = landmark.build({**SIZE, "vocab_size": tokenizer.vocab_size}).eval()
    assert isinstance(model, Decoder)
    return Served("tiny", Engine(model, tokenizer, memory=1 << 24), tokenizer, **options)


def say(one: Served, text: str, **asked: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What is sent, whole and put together of the pieces, of a model that says this; and its tokens of thought."""
    body = ChatRequest.model_validate({"model": "tiny", "messages": HELLO, **asked})
    prompt = one.chat_prompt(body.messages)
    choice = ChatChoice.of(one, body, prompt, 0)
    ids, stream = one.tokenizer.encode(text), one.tokenizer.stream(prompt)
    pieces: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for n, token in enumerate(ids):
        last = n == len(ids) - 1
        said = stream.step(token) + (stream.flush() if last else "")
        for piece in choice.feed(Event(0, token, said, None, "stop" if last else None)):
            for key, value in piece["delta"].items():
                pieces[key] += value
    return choice.whole()["message"], pieces, choice.thought_tokens


@pytest.mark.parametrize("special", [True, False])
def test_marks_that_are_tokens(special: bool) -> None:
    one, text = served(special), "<think>\nWell, it is.\n</think>\n\nYes: <think> no"
    whole, pieces, thought = say(one, text)
    assert whole["reasoning_content"] == pieces["reasoning_content"] == "Well, it is."
    assert whole["content"] == pieces["content"] == ("Yes:  no" if special else "Yes: <think> no")
    assert thought == one.tokenizer.encode(text).index(one.tokenizer.token_to_id("</think>") or 0)
    plain, pieces, _ = say(served(special, reasoning="none"), text)
    assert "reasoning_content" not in plain and plain["content"] == pieces["content"]
    assert plain["content"] == ("\nWell, it is.\n\n\nYes:  no" if special else text)


def test_thought_then_a_call() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    whole, pieces, _ = say(served(False), f"<think>I look <tool_call> up.</think>\n\nSo:\n{call}", tools=TOOLS)
    assert whole["reasoning_content"] == pieces["reasoning_content"] == "I look <tool_call> up."
    assert whole["content"] == pieces["content"] == "So:"
    assert [made["function"] for made in whole["tool_calls"]] == [{"name": "get_weather", "arguments": "{}"}]


def test_a_thought_that_the_template_begins() -> None:
    """All of an answer without an end mark is thought; with a form, nothing is."""
    asked: Any = dict(model="tiny", messages=HELLO, max_tokens=12, seed=3, extra_body={"ignore_eos": True})
    texts = {}
    for reasoning in ("none", "auto"):
        with live([served(False, OPENS, reasoning=reasoning)]) as running:
            client = OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
            got = client.chat.completions.create(**asked)
            thought, content = "", ""
            for chunk in client.chat.completions.create(**asked, stream=True):
                thought += getattr(chunk.choices[0].delta, "reasoning_content", "")
                content += chunk.choices[0].delta.content or ""
            message = got.choices[0].message
            assert message.content == content and (getattr(message, "reasoning_content", None) or "") == thought
            texts[reasoning] = content, thought
            details = got.usage and got.usage.completion_tokens_details
            assert (details and details.reasoning_tokens) == (12 if reasoning == "auto" else None)
            form: Any = {"type": "json_object"}
            formed = client.chat.completions.create(**asked, response_format=form)
            assert (formed.choices[0].message.content or "").startswith("{")
    assert texts["none"][1] == texts["auto"][0] == "" and texts["none"][0].strip("\n") == texts["auto"][1] != ""


def test_a_model_without_marks_has_no_thoughts() -> None:
    model, tokenizer = model_and_tokenizer()
    assert not Served("tiny", Engine(model, tokenizer, memory=1 << 24), tokenizer).thinks
    assert served(True).thinks and served(False).thinks and not served(True, reasoning="none").thinks
