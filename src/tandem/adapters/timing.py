"""The timing profiles that a deployment file names: built-in ones, and files that `tandem profile` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tandem.adapters.deployment import Deployment, Pool
from tandem.core.profiles import PROFILES, Profile
from tandem.errors import ConfigError
from tandem.wire import profile_file


def of_pool(pool: Pool) -> Profile | None:
    """None = the engine's own choice. ConfigError if there is no such profile."""
    if not pool.profile:
        return None
    if profile_file.is_file(pool.profile):
        return profile_file.load(Path(pool.profile)).profile
    if pool.profile not in PROFILES:
        raise ConfigError(
            f"pool {pool.pool_name!r}: no timing profile {pool.profile!r}; there are {', '.join(PROFILES)}, "
            "and .json files that `tandem profile` writes",
            param="profile",
        )
    return PROFILES[pool.profile]


def known(deployment: Deployment) -> Mapping[str, Profile]:
    """By name: the built-in ones, and those of the pools' files. ConfigError if one cannot be read."""
    found = [of_pool(pool) for model in deployment.models for pool in model.pools]
    return {**PROFILES, **{profile.name: profile for profile in found if profile is not None}}
