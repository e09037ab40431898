"""Chat templates against transformers' own rendering, and against templates that mean harm."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from landmark.weights.chat_template import CHATML, ChatTemplate

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.first and system %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}
{%- else %}{% set text = m['content'] %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""

LLAMA31_TOOLS = """\
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one tool call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

QWEN = """\
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.seen %}{% set ns.seen = true %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{% if loop.last and tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama31": LLAMA31_TOOLS,
    "qwen": QWEN,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "chatml": CHATML,
}

TALK = [
    {"role": "user", "content": "  What is <b>2 + 2</b> & why? 🙂\n"},
    {"role": "assistant", "content": '<think>\nsums\n</think>\n\nFour; "naïvely".  '},
    {"role": "user", "content": "And 한국어?"},
    {"role": "assistant", "content": "네."},
]
SYSTEM = [{"role": "system", "content": " Be brief. "}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in <city> & around, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}]},
    {"role": "tool", "content": {"celsius": 3.5, "sky": None, "wet": True}},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}


def reference(template: str, messages: list, **values: object) -> tuple[str, list[tuple[int, int]]]:
    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **values
    )
    return texts[0], spans[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_equal_to_transformers(name: str, system: bool, prompt: bool, tools: list | None) -> None:
    messages = (SYSTEM if system else []) + TALK
    values = dict(tools=tools, add_generation_prompt=prompt, **TOKENS)
    template = ChatTemplate(TEMPLATES[name])
    if name == "gemma" and system:
        with pytest.raises(ValueError, match=r"^chat template: System role not supported$"):
            template.render(messages, **values)
        return
    expected, spans = reference(TEMPLATES[name], messages, **values)
    assert template.render(messages, **values) == expected
    assert template.render_spans(messages, **values) == (expected, spans)
    assert bool(spans) == (name not in ("llama31", "gemma"))


def test_tool_calls_and_options() -> None:
    for messages, values in [
        (CALL, {"tools": TOOLS}),
        (CALL, {"custom_tools": TOOLS}),
        (SYSTEM + CALL[:1], {"add_generation_prompt": True}),
    ]:
        values = TOKENS | {"tools": None} | values
        assert ChatTemplate(LLAMA31_TOOLS).render(messages, **values) == reference(LLAMA31_TOOLS, messages, **values)[0]
    talk = [*TALK, {"role": "skip", "content": "x"}, TALK[0], {"role": "stop", "content": "y"}, TALK[1]]
    for values in ({"add_generation_prompt": True, "enable_thinking": False}, {}):
        assert ChatTemplate(QWEN).render(talk, **values) == reference(QWEN, talk, **values)[0]


def test_spans_are_what_the_assistant_says() -> None:
    prompt, spans = ChatTemplate(CHATML).render_spans(SYSTEM + TALK, add_generation_prompt=False)
    assert [prompt[start:end] for start, end in spans] == [TALK[1]["content"] + "<|im_end|>", "네.<|im_end|>"]
    # Text that holds the marks themselves is still told apart, and a block that is edited afterwards is refused.
    odd = [{"role": "assistant", "content": "\ufdd0 a \ufdd1 b"}]
    prompt, spans = ChatTemplate(CHATML).render_spans(odd, add_generation_prompt=False)
    assert [prompt[start:end] for start, end in spans] == ["\ufdd0 a \ufdd1 b<|im_end|>"]
    edited = "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(ValueError, match="edited after it is rendered"):
        ChatTemplate(edited).render_spans([])


def test_raise_exception() -> None:
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatTemplate(LLAMA2).render(TALK[1:], **TOKENS)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ messages.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% for _ in range(100000000) %}x{% endfor %}",
    ],
)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"^chat template: "):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x | nosuchfilter }}", "{% generation %} open", "{{ 1 / 0 }}", "{{ a.b.c }}"]
)
def test_broken_templates(source: str) -> None:
    with pytest.raises(ValueError, match=r"^chat template: .+"):
        ChatTemplate(source).render([])


def test_values_must_be_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        ChatTemplate(CHATML).render([{"role": "user", "content": object()}])
