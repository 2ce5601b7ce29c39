"""What the engine says of itself beside its geometry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vd_plugin.geometry_route import _read_limits


def engine_client(tokenizer: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        renderer=SimpleNamespace(tokenizer=tokenizer),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=8), parallel_config=SimpleNamespace(data_parallel_size=2)
        ),
    )


@pytest.mark.parametrize(("tokenizer", "max_chars"), [(SimpleNamespace(max_chars_per_token=16), 16), (None, None)])
def test_limits_are_the_engines_own(tokenizer: Any, max_chars: int | None) -> None:
    limits = {"max_model_len": 4096, "max_chars_per_token": max_chars, "max_num_seqs": 16}
    assert _read_limits(engine_client(tokenizer)) == limits
