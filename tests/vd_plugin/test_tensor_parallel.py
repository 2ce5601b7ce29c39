"""Two ranks give the answers of one, and keep the same rows: scores are sums over heads that the ranks share.

The ranks are worker processes with an environment of their own, so their engine lives in a process of its own, too.
It prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES: list[tuple[str, Any]] = [("full", "full"), ("160", 160), ("explicit", [[40, 6]])]


HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "support"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.cpu
def test_two_ranks_answer_as_one(random_model: Path) -> None:
    import engines
    from torch import tensor
    from torch.testing import assert_close

    one = _observe(engines.start(random_model).llm)
    engines.stop()  # its memory and its threads are wanted
    two = _run_on_two_ranks(random_model)

    assert len(one["kept"]) == 1
    assert len(two["kept"]) == 2
    assert two["kept"][0] == two["kept"][1] == one["kept"][0]
    assert two["heads"] == [one["heads"][0] // 2] * 2, "the tower's heads were not shared out: the test shows nothing"
    for name, _ in CASES:
        assert two["answers"][name]["token_ids"] == one["answers"][name]["token_ids"]
        expected = tensor(one["answers"][name]["logprobs"])
        assert_close(tensor(two["answers"][name]["logprobs"]), expected, atol=1e-4, rtol=0)


def _run_on_two_ranks(folder: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function travels to the workers
        "PYTHONPATH": os.pathsep.join([str(HERE), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    for name in ("OMP_NUM_THREADS", "VLLM_DIST_IDENT"):
        environment.pop(name, None)
    # As a module, not as a script: a worker finds `_look` by its module's name.
    code = "import test_tensor_parallel; test_tensor_parallel.observe_two_ranks()"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return seen


def _observe(llm: Any) -> dict[str, Any]:
    """Answers, and on every rank the patches that the tower keeps of an image of noise."""
    from engines import VOCABULARY, draw, request
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=VOCABULARY)
    answers = {}
    for name, asked in CASES:
        key = "visual_token_schedule" if isinstance(asked, list) else "visual_token_budget"
        prompt = request("USER: <image>\nWhat is it? ASSISTANT:", [draw(640, 320, seed=1)], **{key: asked})
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        (completion,) = output.outputs
        answers[name] = {
            "token_ids": list(completion.token_ids),
            "logprobs": [[step[token].logprob for token in sorted(step)] for step in completion.logprobs],
        }
    ranks = llm.apply_model(_look)
    return {"answers": answers, "kept": [rank[0] for rank in ranks], "heads": [rank[1] for rank in ranks]}


def _look(model: Any) -> tuple[list[list[int]], int]:
    import torch

    from vd_plugin.schedule import TokenSplit
    from vd_plugin.vision import prune_tiles, run_tower

    pixels = torch.randn(3, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        kept = prune_tiles(run_tower(model.vision_tower, pixels), TokenSplit(120, 20)).kept
    heads = model.vision_tower.vision_model.encoder.layers[-1].self_attn.num_heads_per_partition
    return kept.tolist(), heads


def observe_two_ranks() -> None:
    from engines import FAST
    from vllm import LLM

    import vd_plugin

    arguments = {**FAST, "distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    llm = LLM(**vd_plugin.engine_args(sys.argv[1], visiondrop={"layers": []}, **arguments))
    seen = json.dumps(_observe(llm))
    llm.llm_engine.engine_core.shutdown()
    print(seen, flush=True)
