"""Chat templates: the Jinja programs with which published models turn a conversation into their prompt.

A template comes from the same place as the weights and is untrusted, so it runs in Jinja's immutable sandbox on
plain JSON values, and whatever goes wrong in it is one ValueError.  What a template may use beyond Jinja's own
language is the de-facto standard of Hugging Face directories: `tojson` without HTML escapes, `raise_exception`,
`strftime_now`, `{% break %}` and `{% continue %}`, and `{% generation %}`, which marks what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, Any]
"""One turn: `role` and `content`, and whatever else the template reads (`tool_calls`, `name`, ...)."""

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else -%}
{{ message.content }}<|im_end|>
{%- endif %}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
"""ChatML, the template of the tokenizers trained here; the end-of-turn token belongs to what the assistant says."""


class ChatTemplate:
    """A compiled template.  Raises ValueError when `source` is not a template."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template: {error.message} in line {error.lineno}") from error

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt.  `variables` are the template's other inputs (`tools`, `bos_token`, ...), JSON values."""
        return self._run(messages, variables, ("", ""))

    def render_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and the [start, end) character ranges inside `{% generation %}`: what the assistant says."""
        prompt = self.render(messages, **variables)
        # U+FDD0..U+FDEF are for a program's own use and never text: two that the prompt lacks bracket the blocks.
        opening, closing = [mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in prompt][:2]
        marked = self._run(messages, variables, (opening, closing))
        spans: list[tuple[int, int]] = []
        plain = ""
        for piece in marked.split(opening):
            inside, closed, outside = piece.partition(closing)
            if closed:
                spans.append((len(plain), len(plain) + len(inside)))
            plain += inside + outside
        if plain != prompt:
            raise ValueError(
                "chat template: a {% generation %} block is edited after it is rendered; output it as it is"
            )
        return prompt, spans

    def _run(self, messages: Sequence[Message], variables: Mapping[str, Any], marks: tuple[str, str]) -> str:
        values = _plain({"messages": list(messages), **variables})
        try:
            return self._template.render(values | {"__marks": marks})
        except SecurityError as error:
            raise ValueError(f"chat template: {error}; it reaches out of the sandbox, so it is not run") from error
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"chat template: {error}") from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: its content between the two marks of the render."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.Name("__marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: tuple[str, str], caller: Macro) -> str:
        return f"{marks[0]}{caller()}{marks[1]}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which here refuses an unsafe attribute when it is read, not when it is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


class _PublicNamespace(Namespace):
    """`namespace()` without underscore names, through which a template could plant attributes."""

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__()
        for name, value in {**(values or {}), **more}.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _environment() -> Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _PublicNamespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _plain(value: Any) -> Any:
    """`value` rebuilt of plain JSON types: a template gets no object with methods of its own."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a conversation and its tools must be JSON values: {error}") from error
