"""Which deployment `tandem up` starts: a file's or the built-in one, changed by what the command line says. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.adapters import deployment as deployment_file
from tandem.adapters.deployment import Deployment, Endpoint, Model, Pool, PoolRole
from tandem.errors import ConfigError
from tandem.wire import profile_file

#: A model that Tandem brings itself (tandem.models.prepare).
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Overrides:
    """None = as the deployment says."""

    engine: str | None = None
    prefill: int | None = None
    decode: int | None = None
    http_port: int | None = None
    grpc_port: int | None = None
    console_port: int | None = None  # 0 = no console
    cluster: str | None = None
    processes: int | None = None


def default() -> Deployment:
    """SmolLM2 on one prefill and one decode worker, small enough for two cores and a laptop's memory."""
    args = {
        # 46 KB a token in float32, 23 in bfloat16: room for two contexts of full length, or four.
        "kv_cache_memory_bytes": 768 * _MIB,
    }
    pools = tuple(Pool(role=role, engine_args=args) for role in (PoolRole.PREFILL, PoolRole.DECODE))
    model = Model(name=DEFAULT_MODEL, path=DEFAULT_MODEL, max_model_len=8192, pools=pools)
    return Deployment(models=(model,))


def overridden(base: Deployment, by: Overrides) -> Deployment:
    """ConfigError where an override does not say which of several pools it means."""
    update: dict[str, object] = {}
    if by.http_port is not None:
        update["http"] = Endpoint(host=base.http.host, port=by.http_port)
    if by.grpc_port is not None:
        update["grpc"] = Endpoint(host=base.grpc.host, port=by.grpc_port)
    if by.console_port is not None:
        update["console"] = base.console.model_copy(update={"enabled": by.console_port > 0, "port": by.console_port})
    if by.cluster is not None:
        update["cluster"] = by.cluster
    if by.processes is not None:
        update["processes"] = by.processes
    models = base.models
    for role, replicas in ((PoolRole.PREFILL, by.prefill), (PoolRole.DECODE, by.decode)):
        if replicas is not None:
            models = _resized(models, role, replicas)
    if by.engine is not None:
        models = tuple(_with_engine(model, by.engine) for model in models)
    update["models"] = models
    # Checked as a whole once more: a port from the command line may be another one's in the file.
    return deployment_file.parse(base.model_copy(update=update).to_yaml(), source="deployment")


def with_paths(base: Deployment, paths: dict[str, Path], folder: Path) -> Deployment:
    """Model folders as found (by model name); chat templates, timing profiles and the folder of recordings relative to
    the deployment file's ``folder``."""

    def placed(model: Model) -> Model:
        template = str(folder / Path(model.chat_template).expanduser()) if model.chat_template else ""
        pools = tuple(pool.model_copy(update={"profile": beside(pool.profile)}) for pool in model.pools)
        update = {"path": str(paths[model.name]), "chat_template": template, "pools": pools}
        return model.model_copy(update=update)

    def beside(profile: str) -> str:
        return str(folder / Path(profile).expanduser()) if profile_file.is_file(profile) else profile

    recorded = base.record.folder
    record = base.record.model_copy(update={"folder": str(folder / Path(recorded).expanduser()) if recorded else ""})
    return base.model_copy(update={"models": tuple(placed(model) for model in base.models), "record": record})


def _resized(models: tuple[Model, ...], role: PoolRole, replicas: int) -> tuple[Model, ...]:
    pools = [(model, pool) for model in models for pool in model.pools if pool.role is role]
    if len(pools) != 1:
        raise ConfigError(
            f"--{role.value} needs exactly one {role.value} pool, and the deployment has {len(pools)}: "
            "set `replicas` in the deployment file",
            param=role.value,
        )
    model, pool = pools[0]
    resized = pool.model_copy(update={"replicas": replicas})
    changed = model.model_copy(update={"pools": tuple(resized if p is pool else p for p in model.pools)})
    return tuple(changed if m is model else m for m in models)


def _with_engine(model: Model, engine: str) -> Model:
    """Another engine understands neither the arguments nor the environment that were meant for this one."""
    pools = tuple(
        pool if pool.engine == engine else pool.model_copy(update={"engine": engine, "engine_args": {}, "env": {}})
        for pool in model.pools
    )
    return model.model_copy(update={"pools": pools})
