"""A step: more requests than the KV cache can hold to their ends."""

from __future__ import annotations

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from benchmarks.gpu.context import Context
from benchmarks.gpu.questions import share_equal
from benchmarks.gpu.server import Server, serve_engine
from benchmarks.gpu.step import StepError, tell
from server.demo import Task, make_tasks

_BLOCK_SIZE: Final = 32
_NUM_GROUPS: Final = 4
_MAX_MODEL_LEN: Final = 2048
_NUM_BLOCKS: Final = _NUM_GROUPS * _MAX_MODEL_LEN // _BLOCK_SIZE + 64
"""For one request of the maximum length, and some; the dozen below needs half as many again in the end."""
_CROWD: Final = 12
_CROWD_TOKENS: Final = 128


def little_memory(context: Context) -> None:
    """Requests that outgrow the KV cache together: they are preempted, computed again, and answered as alone.

    In float32, where that is exact but for near ties.
    """
    options = ["--dtype", "float32", "--block-size", str(_BLOCK_SIZE), "--max-model-len", str(_MAX_MODEL_LEN)]
    options += ["--num-gpu-blocks-override", str(_NUM_BLOCKS), "--no-enable-prefix-caching"]
    tasks = make_tasks(_CROWD // 4)
    with serve_engine(context.model, context.path("engine.log"), options) as server:
        alone = [_long_answer(server, task) for task in tasks]
        before = _preemptions(server)
        with ThreadPoolExecutor(_CROWD) as pool:
            together = list(pool.map(lambda task: _long_answer(server, task), tasks))
        preempted = _preemptions(server) - before
        tell(preemptions=preempted)
    if not preempted:
        raise StepError(f"{_CROWD} requests of {_CROWD_TOKENS} tokens fit {_NUM_BLOCKS} blocks: nothing was preempted")
    answers = [{str(number): tokens for number, tokens in enumerate(each)} for each in (alone, together)]
    tell(equal_to_alone=share_equal(*answers))


def _long_answer(server: Server, task: Task) -> list[str]:
    url = f"data:image/png;base64,{base64.b64encode(task.png()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": task.question}]
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": _CROWD_TOKENS,
        "ignore_eos": True,
        "logprobs": True,
        "mm_processor_kwargs": {"visual_token_budget": 160},
    }
    response = server.client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise StepError(f"a request failed with status {response.status_code}: {response.text[:500]}")
    return [entry["token"] for entry in response.json()["choices"][0]["logprobs"]["content"]]


def _preemptions(server: Server) -> int:
    text = server.client.get("/metrics").text
    return sum(int(float(value)) for value in re.findall(r"^vllm:num_preemptions_total\S* (\S+)", text, re.MULTILINE))
