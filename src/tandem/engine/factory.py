"""Makes the engine that a worker's configuration names; neither engine is imported before that."""

from __future__ import annotations

from tandem.engine.protocol import Engine, EngineConfig
from tandem.errors import ConfigError


def make_engine(config: EngineConfig) -> Engine:
    """ConfigError: no such engine, or its packages are not installed."""
    if config.engine == "sim":
        from tandem.engine.sim import SimEngine

        return SimEngine(config)
    if config.engine == "vllm":
        try:
            from tandem.engine.vllm_engine import VllmEngine
        except ModuleNotFoundError as e:
            raise ConfigError(
                f"engine 'vllm' needs the Python package {e.name!r}, which is not installed: run `make up`, "
                "or use --engine sim",
                param="engine",
            ) from e
        return VllmEngine(config)
    raise ConfigError(f"no engine is called {config.engine!r}; there are 'vllm' and 'sim'", param="engine")
