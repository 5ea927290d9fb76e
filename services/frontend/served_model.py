"""One served model as the frontend knows it: its tokenizer, chat template, limits and defaults.

Everything comes from the deployment file and from the model's folder; nothing of the weights is read.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import Struct

from services.frontend.chat_template import ChatTemplate
from services.frontend.parsers import families
from services.frontend.parsers.output import NewParser
from services.frontend.tokenizer import Tokenizer, read_json
from tandem.adapters.deployment import Model
from tandem.errors import ConfigError, InvalidRequest


class SamplingDefaults(Struct, frozen=True):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    max_model_len: int
    block_size: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    #: The engine ends a generation at these unless told to ignore them.
    eos_ids: frozenset[int]
    #: Sampling that the model's author recommends (generation_config.json); what a request leaves out.
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    #: Makes embeddings instead of text.
    embeds: bool = False
    #: Names of the deployment file.
    tool_parser: str = ""
    reasoning_parser: str = ""

    def new_parser(self, prompt: str, tools: Collection[str] = ()) -> NewParser | None:
        """What takes an answer to the chat ``prompt`` apart; None: it is text throughout."""
        return families.new_parser(self.tool_parser, self.reasoning_parser, prompt=prompt, tools=tools)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a chat. InvalidRequest if the model has no template or the template refuses."""
        if self.embeds:
            raise InvalidRequest(f"model {self.name!r} makes embeddings, no text", param="model")
        if self.template is None:
            raise InvalidRequest(f"model {self.name!r} has no chat template: use completions instead", param="messages")
        return self.template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, extra=extra)

    async def encode(self, text: str, executor: Executor, *, add_special_tokens: bool) -> array[int]:
        """Token ids of ``text``, packed: a tenth of a list's memory for as long as the request runs. Long texts in
        ``executor``, so that streams do not wait for them."""
        ids = self.tokenizer.encode_at_once(text, add_special_tokens=add_special_tokens)
        if ids is not None:
            return array("I", ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            executor, lambda: array("I", self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        )


def load(model: Model) -> ServedModel:
    """ConfigError if the folder is missing or lacks what serving needs."""
    folder = model.folder
    if not folder.is_dir():
        raise ConfigError(f"model {model.name!r}: no folder {folder}")
    families.check(model.tool_parser, model.reasoning_parser)
    tokenizer = Tokenizer(folder, fast=model.tokenizer == "auto", model=model.name)
    generation = read_json(folder / "generation_config.json")
    return ServedModel(
        name=model.name,
        max_model_len=model.max_model_len,
        block_size=model.block_size,
        tokenizer=tokenizer,
        template=_template(model, folder, tokenizer),
        eos_ids=_eos_ids(generation) or _eos_ids(read_json(folder / "config.json")),
        defaults=_defaults(generation),
        embeds=model.task == "embed",
        tool_parser=model.tool_parser,
        reasoning_parser=model.reasoning_parser,
    )


def _template(model: Model, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    if model.chat_template:
        path = Path(model.chat_template).expanduser()
        try:
            return ChatTemplate(path.read_text(), tokenizer.special_tokens, name=str(path))
        except OSError as error:
            raise ConfigError(f"model {model.name!r}: cannot read chat template {path}: {error.strerror}") from None
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(), tokenizer.special_tokens, name=str(path))
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several by name: the one for plain chats
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, tokenizer.special_tokens, name=f"chat_template in {folder / 'tokenizer_config.json'}")


def _defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    """Those of its fields that are numbers."""
    names = [name for name in SamplingDefaults.__struct_fields__ if _is_number(config.get(name))]
    found: dict[str, Any] = {name: float(config[name]) for name in names}
    if "top_k" in found:
        found["top_k"] = max(0, int(found["top_k"]))
    return SamplingDefaults(**found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _eos_ids(config: Mapping[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id")
    return frozenset([ids] if isinstance(ids, int) else ids or ())
