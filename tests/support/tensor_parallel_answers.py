"""A program: answers of an engine of several ranks, as JSON. `python tensor_parallel_answers.py MODEL RANKS OUTPUT`.

Apart from pytest, because the ranks are processes of their own, which import the main module anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engines
from engines import Engine, draw, request
from staged import LAYERS, words

NUM_TOKENS = 4
REQUESTS = [
    request(f"{words(9)} <image> {words(6, 1)}", [draw(336, 336)], visual_token_budget=64),
    request(
        f"{words(20, 2)} <image> {words(3, 3)} <image>", [draw(300, 336, 1), draw(90, 90, 2)], visual_token_budget=100
    ),
    request(f"<image> {words(5, 4)}", [draw(90, 336, 3)], visual_token_budget="full"),
    request(words(12, 5)),
]


def options(ranks: int) -> dict[str, object]:
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"} if ranks > 1 else {}
    return {"layers": LAYERS, **parallel}


def answer(engine: Engine) -> dict[str, object]:
    answers = engine.generate(*REQUESTS, num_tokens=NUM_TOKENS)
    return {
        "token_ids": [each.token_ids for each in answers],
        "logprobs": [each.logprobs.tolist() for each in answers],
    }


def main() -> None:
    model, ranks, output = sys.argv[1:]
    engine = engines.start(model, **options(int(ranks)))
    Path(output).write_text(json.dumps(answer(engine)))
    engines.stop()


if __name__ == "__main__":
    main()
