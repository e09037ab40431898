"""Requests, as OpenAI's API has them, and a few fields more that the engine understands.

Fields that change nothing here are taken and ignored; any other field that is not known is an error. Null is the same
as to leave a field out. Lists end at their first mistake, and have bounds: to describe megabytes of mistakes, or to
make objects of a million messages, would hold everybody up.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault


def _use_default(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


OrNull = BeforeValidator(_use_default)  # null means the default, which is another value
MOST_MESSAGES = 1 << 14  # and their parts
MOST_TOOLS = 1 << 10
MOST_BIASES = 1 << 18  # of all answers together: each one of a large vocabulary's, once
MOST_TOKENS = 1 << 20  # of a request, as ids or as bytes of a text that is only to be tokenised


def _few_messages(messages: Any) -> Any:
    if isinstance(messages, list):
        fields = [m.get(name) for m in messages if isinstance(m, dict) for name in ("content", "tool_calls")]
        _check(len(messages) + sum(len(x) for x in fields if isinstance(x, list)), MOST_MESSAGES, "messages and parts")
    return messages


def _few_tokens(ids: Any) -> Any:
    if isinstance(ids, list):
        many = bool(ids) and isinstance(ids[0], list)
        _check(sum(len(x) for x in ids if isinstance(x, list)) if many else len(ids), MOST_TOKENS, "token ids")
    return ids


def _check(count: int, most: int, what: str) -> None:
    if count > most:
        raise PydanticCustomError("too_many", "{count} {what}; {most} at most", dict(count=count, what=what, most=most))


Number = Annotated[float, Field(allow_inf_nan=False)]
LARGEST = 2**31 - 1
TokenId = Annotated[StrictInt, Field(ge=0, le=LARGEST)]
Count = Annotated[StrictInt, Field(ge=1, le=LARGEST)]
Flag = Annotated[StrictBool, OrNull]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]


def _form(prompt: Any) -> str:
    """Which of its forms a prompt has, told by its beginning."""
    if not isinstance(prompt, list):
        return "text"
    return "texts" if not prompt or isinstance(prompt[0], str) else "batch" if isinstance(prompt[0], list) else "ids"


Prompt = Annotated[
    Annotated[StrictStr, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("batch")],
    Discriminator(_form),
    BeforeValidator(_few_tokens),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    include_usage: Flag = False
    include_obfuscation: Any = None


class JsonSchema(Body):
    name: Annotated[StrictStr, OrNull] = "answer"
    description: StrictStr | None = None
    schema_: Annotated[dict[str, Any], OrNull] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """`regex` and `grammar` (in Lark's notation) are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: StrictStr | None = None
    grammar: StrictStr | None = None


class Generation(Body):
    """What completions and chats share. `top_k` to `return_token_ids` are ours."""

    model: StrictStr
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Any] | None = None  # token ids as JSON's names, and -100 to 100
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, le=LARGEST)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1 << 12, fail_fast=True)] | None = None
    ignore_eos: Flag = False
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    priority: Annotated[StrictInt, Field(ge=-100, le=100), OrNull] = 0
    response_format: ResponseFormat | None = None
    logprobs_of: Annotated[Literal["model", "sampled"], OrNull] = "model"
    return_token_ids: Flag = False

    # Taken and ignored: they change nothing here.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None


class CompletionRequest(Generation):
    prompt: Prompt
    max_tokens: Annotated[StrictInt, Field(ge=0, le=LARGEST)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    echo: StrictBool | None = None
    suffix: None = None


class FunctionCall(Body):
    name: StrictStr
    arguments: Annotated[StrictStr, OrNull] = "{}"
    parsed_arguments: Annotated[Any, Field(exclude=True)] = None  # the official client's, of an answer that it parsed


class ToolCall(Body):
    id: StrictStr | None = None
    type: Annotated[Literal["function"], OrNull] = "function"
    function: FunctionCall
    index: StrictInt | None = None


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr
    prompt_cache_breakpoint: Any = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: StrictStr


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None
    reasoning_content: StrictStr | None = None

    # What clients send back of an answer, though it says nothing.
    audio: Any = None
    function_call: None = None
    annotations: Any = None
    parsed: Any = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few_messages)]


class Function(Body):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: StrictStr


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedTools(Body):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class ChatRequest(Generation):
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    modalities: list[Literal["text"]] | None = None

    # What is not done here, so that only null is right.
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    web_search_options: None = None

    @property
    def named(self) -> list[str]:
        """The functions that `tool_choice` names."""
        match self.tool_choice:
            case NamedTool(function=function):
                return [function.name]
            case AllowedTools(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools]
        return []

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        chosen = isinstance(self.tool_choice, AllowedTools)
        return [tool for tool in tools if not chosen or tool.function.name in self.named]

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "none", "auto")


class EmbeddingRequest(Body):
    model: StrictStr
    input: Prompt
    encoding_format: Annotated[Literal["float", "base64"], OrNull] = "float"
    dimensions: Count | None = None
    user: StrictStr | None = None


class TokenizeRequest(Body):
    """Of a text, or of a conversation as the chat template writes it."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: Flag = True


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(_few_tokens)]
