"""Request bodies, typed: wrong types, ranges and JSON are refused here with the field's name.

Owns the shapes and their bounds. Unknown fields pass unread: clients send what their vendor invented last week."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from router.errors import RequestError

STOPS_MAX = 16  # OpenAI takes 4; vLLM any number
STOP_CHARS_MAX = 256
CHOICE_TEXTS_MAX = 256
BIASES_MAX = 1024  # OpenAI's 300, and some
ABSENT = msgspec.Raw(b"")  # a Raw cannot be null
ANSWERS_MAX = 128  # to one request
LOGPROBS_MAX = 20  # likeliest tokens told beside the chosen one
SEED_MAX = 2**63 - 1

Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Tokens = Annotated[int, Meta(ge=0, le=10_000_000)]
Positive = Annotated[int, Meta(ge=1, le=10_000_000)]
Stops = Annotated[list[Annotated[str, Meta(max_length=STOP_CHARS_MAX)]], Meta(max_length=STOPS_MAX)]


class StreamOptions(Struct):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class JsonSchema(Struct):
    """What OpenAI's `response_format` of type json_schema holds. Its schema goes to the worker as it was written."""

    schema: msgspec.Raw = field(default_factory=lambda: ABSENT)


class ResponseFormat(Struct):
    """OpenAI's `response_format`."""

    type: Annotated[str, Meta(max_length=64)]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct):
    """What an answer must be beyond `response_format`, named as in vLLM. One of them."""

    json: msgspec.Raw = field(default_factory=lambda: ABSENT)
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=CHOICE_TEXTS_MAX)] | None = None
    grammar: str | None = None  # in lark's notation


class ContentPart(Struct):
    """A piece of a message's content. Only text is read."""

    type: str
    text: str = ""
    refusal: str = ""


class ChatMessage(Struct):
    """One message of a chat."""

    role: Annotated[str, Meta(max_length=32)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Common(Struct, kw_only=True):
    """What several dialects share."""

    model: Annotated[str, Meta(max_length=256)] | None = None  # of the catalogue; none: the one that is served
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Annotated[int, Meta(ge=0)], Bias], Meta(max_length=BIASES_MAX)] | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Meta(ge=-SEED_MAX, le=SEED_MAX)] | None = None
    stop: Annotated[str, Meta(max_length=STOP_CHARS_MAX)] | Stops | None = None
    n: Annotated[int, Meta(ge=1, le=ANSWERS_MAX)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    service_tier: Annotated[str, Meta(max_length=32)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=256)] | None = None
    background: bool = False
    completion_window: Annotated[str, Meta(pattern="^[1-9][0-9]{0,4}[mh]$")] | None = None  # the batch API's: 24h
    metadata: dict[str, Any] | None = None
    # Beyond OpenAI, named as in vLLM and SGLang.
    structured_outputs: StructuredOutputs | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=10_000_000)] | None = None
    min_p: Share | None = None
    min_tokens: Tokens | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None  # refused: OpenAI's echo tells the same
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=64)] | None = None


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=65_536)]
    max_completion_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's name; `enable_thinking` alone is read


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool = False
    suffix: str | None = None
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    best_of: int | None = None


_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
Body = TypeVar("Body")


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """The body as its type. Raises RequestError 400 naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        path, missing = _PATH.search(str(error)), _MISSING.match(str(error))
        param = path[1] if path else None
        if missing is not None:
            raise needs_field(f"{param}.{missing[1]}" if param else missing[1]) from None
        raise wrong_field(param, _PATH.sub("", str(error))) from None
    except msgspec.DecodeError as error:
        raise RequestError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError(400, "The body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError(400, "The body is not valid UTF-8.", code="invalid_json") from None


def wrong_field(param: str | None, why: str) -> RequestError:
    """400 that names a field and says what is wrong with it."""
    named = f"Invalid value for '{param}': {why}" if param else f"Invalid body: {why}"
    return RequestError(400, named, param=param, code="invalid_value")


def needs_field(param: str) -> RequestError:
    """400 for a field that is not there."""
    return RequestError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def refuse_unsupported(param: str, why: str) -> RequestError:
    """400 for a field that is understood and cannot be served."""
    return RequestError(400, f"'{param}' is not supported: {why}.", param=param, code="unsupported_parameter")
