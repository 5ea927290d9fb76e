from __future__ import annotations

import pytest

from tandem.adapters.deployment import parse
from tandem.errors import ConfigError


@pytest.mark.parametrize("text", ["version: 2020-13-45", "[" * 3000, "a: [", "just words"])
def test_what_is_no_yaml_of_ours_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="deployment file"):
        parse(text)
