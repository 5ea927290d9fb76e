"""How tokens are to be drawn, as clients of any protocol say it: names, types and ranges, declared once.

msgspec checks them while it decodes; a field that is not declared here or in a subclass is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from tandem.errors import InvalidRequest

T = TypeVar("T")

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None: the model's default."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 or -1: all tokens")] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | list[StopString] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    request_class: Annotated[str, Meta(description="a class of the deployment file")] | None = None
    ttft_slo_ms: (
        Annotated[int, Meta(ge=1, le=2**31 - 1, description="refuse rather than be later than this")] | None
    ) = None

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


def decode(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """InvalidRequest, naming the field, for what is no JSON or not what ``decoder`` expects."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except (RecursionError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON: nested too deeply, or not UTF-8") from None


def convert(values: dict[str, Any], kind: type[T]) -> T:
    """``kind`` from plain values, under the same rules."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from None


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec says "<what is wrong> - at `$.path`"; for a field that is missing or unknown, its name is in the text."""
    text, _, path = str(error).partition(" - at `")
    param = path.rstrip("`").removeprefix("$").lstrip(".")
    for mark in ("unknown field `", "required field `"):
        if mark in text:
            name = text.split(mark)[1].rstrip("`")
            param = f"{param}.{name}" if param else name
    message = text.replace("Object contains unknown", "unknown").replace("Object missing", "missing")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param or None)
