"""A batch on an engine in this process: `python -m benchmarks.gpu.batch MODEL REQUESTS TOKENS [--eager]`.

For tools that watch one process. The requests have an image each, at all budgets in turn, or none; they run together.
"""

from __future__ import annotations

import os
import sys
from io import BytesIO
from typing import Any, Final

from PIL import Image

from benchmarks.gpu.questions import BUDGETS
from server.demo import make_tasks
from vd_plugin.wire import BUDGET_KEY

_KV_BYTES: Final = 2 << 30
"""Given, so that vLLM measures no memory: a tool may use some, too."""


def main(model: str, num_requests: int, num_tokens: int, *, eager: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from vd_plugin import engine_args

    options: dict[str, Any] = {"enforce_eager": eager, "max_model_len": 4096, "kv_cache_memory_bytes": _KV_BYTES}
    llm = LLM(**engine_args(model, skip_mm_profiling=True, **options))
    token = llm.get_tokenizer().decode([llm.llm_engine.model_config.hf_config.image_token_index])
    prompts: list[dict[str, Any]] = []
    for number, task in enumerate(make_tasks((num_requests + 3) // 4)[:num_requests]):
        budget = BUDGETS[number % len(BUDGETS)]
        if budget is None:
            prompts.append({"prompt": f"USER: {task.question} ASSISTANT:"})
            continue
        prompts.append(
            {
                "prompt": f"USER: {token}\n{task.question} ASSISTANT:",
                "multi_modal_data": {"image": Image.open(BytesIO(task.png()))},
                "mm_processor_kwargs": {BUDGET_KEY: budget},
            }
        )
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    answers = llm.generate(prompts, params, use_tqdm=False)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [num_tokens] * num_requests
    print(f"{num_requests} answers of {num_tokens} tokens")


if __name__ == "__main__":
    _model, _requests, _tokens, *_options = sys.argv[1:]
    main(_model, int(_requests), int(_tokens), eager="--eager" in _options)
