"""Requests, as OpenAI's API has them, and a few fields more that the engine understands.

Fields that change nothing here are taken and ignored; any other field that is not known is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Number = Annotated[float, Field(allow_inf_nan=False)]
LARGEST = 2**31 - 1
TokenId = Annotated[StrictInt, Field(ge=0, le=LARGEST)]
Count = Annotated[StrictInt, Field(ge=1, le=LARGEST)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: Any = None


class JsonSchema(Body):
    name: StrictStr = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
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
    stop: StrictStr | list[StrictStr] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, le=LARGEST)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool = False
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    response_format: ResponseFormat | None = None
    logprobs_of: Literal["model", "sampled"] = "model"
    return_token_ids: StrictBool = False

    # Taken and ignored: they change nothing here.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None


class CompletionRequest(Generation):
    prompt: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0, le=LARGEST)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    echo: StrictBool | None = None
    suffix: None = None


class FunctionCall(Body):
    name: StrictStr
    arguments: StrictStr = "{}"


class ToolCall(Body):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None

    # What clients send back of an answer, though it says nothing.
    audio: Any = None
    function_call: None = None
    annotations: Any = None
    parsed: Any = None


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


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    modalities: list[Literal["text"]] | None = None


class EmbeddingRequest(Body):
    model: StrictStr
    input: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: StrictStr | None = None


class TokenizeRequest(Body):
    """Of a text, or of a conversation as the chat template writes it."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    add_special_tokens: StrictBool = True


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: list[TokenId]
