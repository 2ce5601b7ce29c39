"""A batch of requests of every kind, for laws that compare a request alone with itself in company."""

from __future__ import annotations

from typing import Any

from engines import draw, request
from staged import words

SIZES = [(336, 336), (640, 320), (320, 640), (500, 480), (90, 90)]
BUDGETS = [32, 48, 64, 100, 160, 320]
PROMPT = f"{words(20)} <image> {words(6, 1)} <image> {words(4, 2)}"
IMAGES = [draw(640, 320), draw(500, 480, seed=1)]


def mixed_batch() -> list[dict[str, Any]]:
    """16 requests: every size and budget, image first and last, two images, full, text alone."""
    batch = [
        request(
            f"{words(3 + 7 * number, number)} <image> {words(1 + number, number + 50)}",
            [draw(*SIZES[number % len(SIZES)], seed=number)],
            visual_token_budget=BUDGETS[number % len(BUDGETS)],
        )
        for number in range(9)
    ]
    batch.insert(2, request(words(30, 70)))
    batch.insert(5, request(words(1, 71)))
    batch.insert(7, request(f"{words(9, 72)} <image>", [draw(336, 336, 72)], visual_token_budget=64))
    batch.insert(8, request(f"<image> {words(9, 73)}", [draw(640, 320, 73)], visual_token_budget=48))
    batch.insert(9, request(PROMPT, IMAGES, visual_token_budget=[64, 160]))
    batch.append(request(f"{words(9, 74)} <image>", [draw(90, 90, 74)], visual_token_budget="full"))
    batch.append(request(f"{words(9, 75)} <image><image>", IMAGES, visual_token_budget=["full", 100]))
    assert len(batch) == 16
    return batch
