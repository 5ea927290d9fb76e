"""The deployment file: models, their pools of workers, tenants, classes and policy. One schema, for every reader.

`tandem up -f FILE` starts it; router, frontend and workers read the same file (``TANDEM_DEPLOYMENT``), each its part.
docs/deployment-file.md is generated from these classes.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tandem.errors import ConfigError

#: Names that become parts of process names and of paths.
_NAME = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolRole(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    #: Every worker does both phases by itself; no KV transfer.
    AGGREGATED = "aggregated"


class Pool(_Part):
    """Workers of one model that are alike."""

    role: PoolRole = Field(description="prefill, decode, or aggregated (both phases on each worker, no KV transfer)")
    name: Annotated[str, Field(pattern=_NAME)] = Field("", description="unique within the model; the role when empty")
    replicas: Annotated[int, Field(ge=0, le=512)] = Field(1, description="workers to start")
    engine: Literal["vllm", "sim"] = Field("vllm", description="vllm, or the simulated engine")
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="for the engine: vLLM's AsyncEngineArgs, or the simulated engine's options",
    )
    profile: str = Field(
        "",
        description="timing profile that the router starts from (and the simulated engine runs by): a built-in one's "
        "name, or a .json file of `tandem profile`; the engine's own choice when empty",
    )
    env: dict[str, str] = Field(default_factory=dict, description="extra environment of the worker processes")

    @property
    def pool_name(self) -> str:
        return self.name or self.role.value


class Model(_Part):
    """One served model: a pipeline of its own."""

    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="what clients put into `model`")
    path: str = Field(
        description="folder with weights, tokenizer and chat template (Hugging Face layout), "
        "or a model that `make setup` prepares: SmolLM2-135M-Instruct"
    )
    task: Literal["generate", "embed"] = Field(
        "generate", description="generate, or embed: its pools are aggregated and make vectors"
    )
    max_model_len: Annotated[int, Field(ge=16)] = Field(4096, description="tokens of prompt plus output")
    block_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="tokens of a KV block; a multiple of 32 on a CPU"
    )
    dtype: str = Field(
        "auto",
        description="of weights and KV: bfloat16, float16, float32, or auto: the model's own; on a CPU that is slow at "
        "bfloat16 (x86 without AVX-512) float32, which takes twice the memory. All workers of a model must come to the "
        "same: where hosts differ, name one",
    )
    kv_lease_s: Annotated[float, Field(gt=2, le=600)] = Field(
        30.0, description="how long a prefill worker holds KV that nobody pulls, seconds"
    )
    tokenizer: Literal["auto", "hf"] = Field(
        "auto",
        description="what encodes prompts: tokie where it proves at start that its tokens are the same, else and with "
        "hf Hugging Face's tokenizers",
    )
    chat_template: str = Field("", description="path of a Jinja chat template; the model folder's own when empty")
    tool_parser: Literal["", "hermes", "llama3", "mistral", "harmony"] = Field(
        "", description="how the model writes tool calls: hermes (Qwen too), llama3, mistral, or harmony (gpt-oss)"
    )
    reasoning_parser: Literal["", "think", "mistral", "harmony"] = Field(
        "", description="how it marks its reasoning: think (<think>: Qwen, DeepSeek), mistral, or harmony (gpt-oss)"
    )
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)] = Field(description="the workers")

    @model_validator(mode="after")
    def _check_pools(self) -> Model:
        names = [pool.pool_name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"model {self.name!r}: pool names must differ; give each pool a `name`")
        if all(pool.role is PoolRole.PREFILL for pool in self.pools):
            raise ValueError(f"model {self.name!r}: needs at least one decode or aggregated pool")
        if self.task == "embed" and any(pool.role is not PoolRole.AGGREGATED for pool in self.pools):
            raise ValueError(f"model {self.name!r}: an embedding has one phase only; make its pools aggregated")
        return self

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.path))


class Class(_Part):
    """A request class: what comes first, and what it may expect."""

    name: str = Field(description="what a request names")
    rank: int = Field(0, description="lower goes first")
    ttft_slo_s: float | None = Field(None, gt=0, description="opt-in SLO: seconds to the first token")
    ttft_slo_per_token_s: float = Field(0.0, ge=0, description="added to ttft_slo_s for each prompt token")
    tpot_slo_s: float | None = Field(None, gt=0, description="opt-in SLO: mean seconds per output token")
    ordering_deadline_s: float = Field(5.0, gt=0, description="orders requests of equal standing; refuses nothing")
    timeout_s: float = Field(600.0, gt=0, description="hard limit of a request, seconds")
    min_share: float = Field(0.0, ge=0, lt=1, description="share of prefill time guaranteed under load")
    background: bool = Field(False, description="fills what the others leave, under guard")
    best_effort: bool = Field(False, description="late requests run behind the rest instead of being refused")


class Tenant(_Part):
    name: str = Field(description="shown in metrics")
    weight: float = Field(1.0, gt=0, description="share of tokens among tenants that wait")
    request_class: str = Field("", description="class of its requests that name none; the first class when empty")
    allowed_classes: tuple[str, ...] = Field((), description="classes that it may name; all when empty")
    api_key_sha256: tuple[str, ...] = Field((), description="SHA-256 of its API keys, 64 hex digits each")

    @field_validator("api_key_sha256")
    @classmethod
    def _check_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        for digest in digests:
            if not _SHA256.fullmatch(digest):
                raise ValueError(f"{digest!r} is not the SHA-256 of a key: 64 hex digits (printf %s KEY | sha256sum)")
        return digests


class Limits(_Part):
    max_body_bytes: int = Field(8_000_000, gt=0, description="HTTP request body, gRPC message")
    max_connections: int = Field(10_000, gt=0, description="open HTTP connections of one frontend")
    header_timeout_s: float = Field(
        30.0, gt=0, description="an HTTP connection whose request's headers take longer is closed"
    )
    write_timeout_s: float = Field(30.0, gt=0, description="so is one whose reader takes nothing for this long")
    max_n: int = Field(16, gt=0, description="largest `n`")
    max_stop: int = Field(16, gt=0, description="stop strings in a request")


class Endpoint(_Part):
    host: str = Field("127.0.0.1", description="interface to listen on; 0.0.0.0 = all")
    port: int = Field(0, ge=0, le=65535, description="port of the first frontend")


class Console(_Part):
    """The operators' web page that `tandem up` starts beside the cluster."""

    enabled: bool = Field(True, description="start it")
    host: str = Field(
        "127.0.0.1",
        description="interface to listen on; beyond loopback it needs TANDEM_CONSOLE_TOKEN in the environment",
    )
    port: int = Field(0, ge=0, le=65535, description="of the page; 0 = any free one, which `tandem up` prints")


class Liveness(_Part):
    """Silence thresholds. On a busy CPU give them room."""

    suspect_s: float = Field(1.5, gt=0, description="silent this long: no new work")
    dead_s: float = Field(6.0, gt=0, description="silent this long, and unreachable: declared dead")


class Record(_Part):
    """What routers record of their decisions, for `tandem sim --record`: lengths and identities, no prompts."""

    folder: str = Field("", description="where; empty = nothing is recorded. One file per router, model and start")
    max_mb: int = Field(256, ge=1, le=100_000, description="bound of one file; the recording ends there")


class Deployment(_Part):
    version: Literal[1] = Field(1, description="of this schema")
    cluster: Annotated[str, Field(pattern=_NAME, min_length=1)] = Field(
        "default", description="name space of subjects and keys"
    )
    http: Endpoint = Field(Endpoint(port=8000), description="the frontend's OpenAI API")
    grpc: Endpoint = Field(Endpoint(port=9000), description="the frontend's gRPC API")
    frontends: int = Field(1, ge=1, le=64, description="frontends; each next one takes the next ports")
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="processes of each frontend: they share its HTTP port, and each takes a gRPC port of its own",
    )
    routers: int = Field(1, ge=1, le=8, description="router processes: one leads, the others stand by")
    models: Annotated[tuple[Model, ...], Field(min_length=1)] = Field(description="what is served")
    classes: tuple[Class, ...] = Field((Class(name="interactive"),), description="the first is the default")
    tenants: tuple[Tenant, ...] = Field((), description="API keys; empty = no authentication, one tenant `default`")
    policy: dict[str, Any] = Field(default_factory=dict, description="scheduling knobs, see below")
    limits: Limits = Field(Limits(), description="what one request or client may ask for")
    record: Record = Field(Record(), description="recordings of the routers' decisions")
    console: Console = Field(Console(), description="the operators' web page")
    liveness: Liveness = Field(Liveness(), description="when a silent worker is suspected, and when it is dead")

    @model_validator(mode="after")
    def _check_ports(self) -> Deployment:
        http, grpc = self.http, self.grpc
        first, second = sorted((http, grpc), key=lambda endpoint: endpoint.port)
        taken = self.frontends * (1 if first is http else self.processes)
        if (
            http.port
            and second.port - first.port < taken
            and (http.host == grpc.host or "0.0.0.0" in (http.host, grpc.host))
        ):
            port = max(http.port, grpc.port)
            raise ValueError(
                f"`http` and `grpc` both want port {port}: each of {self.frontends} frontends takes one of each"
                + (f", and a gRPC port for each of its {self.processes} processes" if self.processes > 1 else "")
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Deployment:
        for kind, names in (
            ("model", [m.name for m in self.models]),
            ("class", [c.name for c in self.classes]),
            ("tenant", [t.name for t in self.tenants]),
        ):
            double = {n for n in names if names.count(n) > 1}
            if double:
                raise ValueError(f"{kind} {sorted(double)[0]!r} is there twice")
        known = {c.name for c in self.classes}
        for tenant in self.tenants:
            for name in (*tenant.allowed_classes, *([tenant.request_class] if tenant.request_class else [])):
                if name not in known:
                    raise ValueError(f"tenant {tenant.name!r}: class {name!r} is not declared under `classes`")
        return self

    def model(self, name: str) -> Model:
        """ConfigError if there is no such model."""
        for model in self.models:
            if model.name == name:
                return model
        raise ConfigError(f"no model {name!r} in the deployment file; it has: {', '.join(m.name for m in self.models)}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def parse(text: str, *, source: str = "deployment file") -> Deployment:
    """ConfigError with the place of each mistake, in words."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two: 2020-13-45, and [[[[...
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping with `models`, found {type(data).__name__}")
    try:
        return Deployment.model_validate(data)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(p) for p in item['loc']) or '(top)'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False)
            # Of a list whose items are wrong, it also says that nothing is left of it.
            if not (item["type"] == "too_short" and item["input"])
        ]
        raise ConfigError(f"{source}:\n" + "\n".join(lines)) from None


def read(path: str | Path) -> Deployment:
    """ConfigError if the file is missing, unreadable or wrong."""
    try:
        text = Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read deployment file {path}: {error}") from None
    return parse(text, source=str(path))
