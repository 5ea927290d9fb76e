"""What a model's folder says about it, however odd."""

from __future__ import annotations

import json
import math
from pathlib import Path

from services.frontend.served_model import SamplingDefaults, load
from tandem.adapters.deployment import Model, Pool, PoolRole
from tests.unit.frontend.conftest import write_byte_level


def test_recommended_sampling_is_what_is_a_number(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    said = {"temperature": 0.6, "top_k": -1, "top_p": "0.9", "min_p": math.nan, "repetition_penalty": math.inf}
    (folder / "generation_config.json").write_text(json.dumps(said))
    model = Model(name="m", path=str(folder), max_model_len=128, pools=(Pool(role=PoolRole.DECODE),))
    assert load(model).defaults == SamplingDefaults(temperature=0.6, top_k=0)
