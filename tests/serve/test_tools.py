"""Tool calls as models write them: however a text is cut into pieces, the same content, names and arguments."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from landmark.serve.tools import HERMES, LLAMA, MISTRAL, Dialect, ToolReader, dialect, grammar

NAMES = ["f", "get_weather"]
CASES: list[tuple[Dialect, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Let me see.", "Let me see.", []),
    (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln \\"a}\\\\", "n": [1, {"x": 2}]}}\n'
        "</tool_call>",
        "Sure.",
        [("get_weather", '{"city": "Köln \\"a}\\\\", "n": [1, {"x": 2}]}')],
    ),
    (
        HERMES,
        '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n'
        "</tool_call>",
        "",
        [("f", "{}"), ("f", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, 'a < b and <tool> {"name": "f"}', 'a < b and <tool> {"name": "f"}', []),
    (HERMES, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', '{"name": "nobody", "arguments": {}}', []),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"name": "nobody"}}</tool_call>done',
        "done",
        [("f", '{"name": "nobody"}')],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "a, b}"}</tool_call>', "", [("f", '"a, b}"')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": 12 , "x": 1}</tool_call>', "", [("f", "12 ")]),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, 2]}}, {"name": "get_weather", "arguments": {}}]',
        "",
        [("f", '{"a": [1, 2]}'), ("get_weather", "{}")],
    ),
    (LLAMA, '{"name": "f", "parameters": {"q": "x"}}', "", [("f", '{"q": "x"}')]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"q": "x"}}', "", [("f", '{"q": "x"}')]),
    (LLAMA, "No {braces} here", "No {braces} here", []),
]


def read(way: Dialect, pieces: list[str], forced: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """What a client of the stream puts together."""
    reader, content, calls = ToolReader(way, NAMES, forced), "", list[list[Any]]()
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    for delta in deltas:
        if delta.index is None:
            content += delta.content
        elif delta.name is not None:
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        else:
            calls[delta.index][1] += delta.arguments
    assert reader.content == content and [[c.name, c.arguments] for c in reader.calls] == calls
    return content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_whole_and_letter_by_letter(case: tuple[Dialect, str, str, list[tuple[str, str]]]) -> None:
    way, text, content, calls = case
    assert read(way, [text]) == (content, calls)
    assert read(way, list(text)) == (content, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 120), max_size=8))
def test_any_cut(case: tuple[Dialect, str, str, list[tuple[str, str]]], cuts: list[int]) -> None:
    way, text, content, calls = case
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    assert read(way, [text[a:b] for a, b in pairwise(ends)]) == (content, calls)


@given(st.text(alphabet='<tool_call>/{}"name: f,[]\\ \n', max_size=80), st.lists(st.integers(0, 80), max_size=5))
def test_whatever_is_said_cuts_change_nothing(text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    assert read(HERMES, [text[a:b] for a, b in pairwise(ends)]) == read(HERMES, [text])


def test_arguments_stream_before_they_are_complete() -> None:
    reader = ToolReader(HERMES, NAMES)
    deltas = reader.feed('<tool_call>{"name": "f", "arguments": {"city": "Par')
    assert [d.name for d in deltas] == ["f", None] and deltas[1].arguments == '{"city": "Par'


TWO = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "\n"),
    (MISTRAL, '{"name": "f", "arguments": {"a": 1}}', ", "),
]


@pytest.mark.parametrize(("way", "call", "between"), TWO)
def test_calls_that_are_cut_off_are_no_content(way: Dialect, call: str, between: str) -> None:
    """Wherever two forced calls end; and after a whole call also where the model was free to call."""
    text = f"{'[TOOL_CALLS][' * way.many}{call}{between}{call}{']' * way.many}"
    whole = ("f", '{"a": 1}')
    for end in range(len(text) + 1):
        content, calls = read(way, [text[:end]], forced=True)
        assert (content, calls) == read(way, list(text[:end]), forced=True)
        assert content == "" and len(calls) <= 2 and all(whole[1].startswith(made) for _, made in calls)
        free = read(way, [text[:end]])
        assert free == read(way, list(text[:end])) and (not calls or free == (content, calls))
    assert calls == [whole, whole]
    assert read(HERMES, ['<tool_call>{"name'])[0] == '{"name'  # it may have been anything


def test_dialects_by_template() -> None:
    assert dialect("... <tool_call> ...") is HERMES and dialect(None) is HERMES
    assert dialect("[TOOL_CALLS]") is MISTRAL and dialect("<|python_tag|>") is LLAMA


@pytest.mark.parametrize("way", [HERMES, MISTRAL, LLAMA])
def test_what_the_grammar_allows_is_what_the_reader_reads(way: Dialect) -> None:
    from llguidance import LLMatcher

    functions = [
        {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"name": "g"},
    ]
    for parallel in (False, True):
        source = grammar(way, functions, parallel)
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(source)) == "", source
    call = json.dumps({"name": "f", way.arguments: {"a": 3}})
    newline = "\n" if way is HERMES else ""
    text = f"{way.begin}{newline}{'[' * way.many}{call}{']' * way.many}{newline}{way.end}"
    assert read(way, [text]) == ("", [("f", '{"a": 3}')])
