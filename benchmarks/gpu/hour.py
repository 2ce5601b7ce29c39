"""Runs steps one after another, whatever becomes of each."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.processes import run
from benchmarks.gpu.report import line_of, summary, tail_of
from benchmarks.gpu.step import SKIPPED_STATUS, Outcome, Step, Verdict, read_figures, read_reason

LEAST_SECONDS: Final = 20.0
"""With less left of the budget, no step is started: an engine takes as long to start."""


@dataclass
class Hour:
    """One run of a plan.

    Args:
        folder: for logs and results; the newest summary is in `summary.json`.
        budget_seconds: for all steps together; None for as long as they may take.
    """

    steps: Sequence[Step]
    folder: Path
    gpus: Sequence[Gpu]
    budget_seconds: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """Goes into the summary as it is."""
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> int:
        """All steps, with a line for each, and the summary in the end.

        Returns:
            The exit status: 1 if a step failed or its time was up, 130 after Ctrl-C, otherwise 0.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        deadline = None if self.budget_seconds is None else start + self.budget_seconds
        is_interrupted = False
        for number, step in enumerate(self.steps, 1):
            print(f"[{number}/{len(self.steps)}] {step.name}: {step.about}", flush=True)
            begun = time.monotonic()
            try:
                outcome = self._outcome_of(step, deadline)
            except KeyboardInterrupt:
                is_interrupted = True
                log = self._log_of(step)
                found = read_figures(log.read_text(errors="replace")) if log.exists() else {}
                outcome = Outcome(
                    step.name, Verdict.INTERRUPTED, time.monotonic() - begun, "by Ctrl-C or a signal", found, log
                )
            self.outcomes.append(outcome)
            print(line_of(outcome), flush=True)
            if outcome.is_bad:
                print(tail_of(outcome), flush=True)
            self._save()
            if is_interrupted:
                break
        print(summary(self.outcomes, self.folder, time.monotonic() - start), flush=True)
        print(json.dumps(self.to_dict()), flush=True)
        if is_interrupted:
            return 130
        return int(any(outcome.is_bad for outcome in self.outcomes))

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "gpu",
            **self.about,
            "gpus": [str(gpu) for gpu in self.gpus],
            "steps": [
                {
                    "step": outcome.step,
                    "outcome": str(outcome.verdict),
                    "seconds": round(outcome.seconds, 1),
                    "reason": outcome.reason,
                    "figures": dict(outcome.figures),
                }
                for outcome in self.outcomes
            ],
        }

    def _outcome_of(self, step: Step, deadline: float | None) -> Outcome:
        left = float("inf") if deadline is None else deadline - time.monotonic()
        if reason := self._obstacle(step, left):
            return Outcome(step.name, Verdict.SKIPPED, 0, reason)
        log = self._log_of(step)
        log.unlink(missing_ok=True)
        start = time.monotonic()
        try:
            status = run(step.command, log, min(step.limit_seconds, left), os.environ)
        except OSError as error:
            return Outcome(step.name, Verdict.FAILED, 0, f"it cannot be started: {error}")
        seconds = time.monotonic() - start
        output = log.read_text(errors="replace")
        figures = read_figures(output)
        if status == 0:
            return Outcome(step.name, Verdict.PASSED, seconds, "", figures, log)
        if status is None:
            which = "the budget's" if left < step.limit_seconds else "its"
            reason = f"killed when {which} time was up"
            return Outcome(step.name, Verdict.TIMED_OUT, seconds, reason, figures, log)
        verdict = Verdict.SKIPPED if status == SKIPPED_STATUS else Verdict.FAILED
        ended = f"signal {-status}: " if status < 0 else ""
        return Outcome(step.name, verdict, seconds, ended + read_reason(output), figures, log)

    def _obstacle(self, step: Step, seconds_left: float) -> str | None:
        if step.num_gpus > len(self.gpus):
            have = {0: "no NVIDIA GPU", 1: "one NVIDIA GPU"}.get(len(self.gpus), f"{len(self.gpus)} NVIDIA GPUs")
            return have if step.num_gpus == 1 else f"{have}, and it needs {step.num_gpus}"
        if step.tool is not None and shutil.which(step.tool) is None:
            return f"{step.tool} is not found"
        if seconds_left < LEAST_SECONDS:
            return "the budget is spent"
        return None

    def _log_of(self, step: Step) -> Path:
        return self.folder / f"{step.name}.log"

    def _save(self) -> None:
        (self.folder / "summary.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
