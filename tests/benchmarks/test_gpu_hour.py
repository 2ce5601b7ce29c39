"""`make gpu` goes on whatever becomes of a step, says what that was, and leaves no process behind. Made-up steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_programs import put

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.plan import CHECKS, make_steps
from benchmarks.gpu.step import SKIPPED_STATUS

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "gpu_hour.py"

GOOD = "print('figures {\"answers\": 20}')"
BAD = """print("first words"); print("reason: three answers differ")
print('figures {"equal": 0.7}')
raise SystemExit(1)"""
BROKEN = "raise ValueError('heads do not divide')"
SKIPPED = f"print('reason: flashinfer is not installed'); raise SystemExit({SKIPPED_STATUS})"
FAMILY = """
import os, signal, subprocess, sys, time
stubborn = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
away = f"import os, subprocess, sys; os.setsid(); subprocess.Popen([sys.executable, '-c', {stubborn!r}])"
pids = [os.getpid(), subprocess.Popen([sys.executable, "-c", stubborn]).pid]
subprocess.run([sys.executable, "-c", away])  # its child outlives it, in a session of its own
open(FOLDER + "/" + sys.argv[1] + ".started", "w").close()
print("figures", '{"questions": 3}', flush=True)
"""
"""A step with a child and an orphaned grandchild, none of which listens to interrupts."""
TIDY = """
import time
try:
    time.sleep(300)
except KeyboardInterrupt:
    print("figures", '{"tidied": true}', flush=True)
"""
HANGS = FAMILY + "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"


class Run:
    """A run in a process of its own: it becomes the parent of orphans, which pytest must not."""

    def __init__(self, folder: Path, steps: Sequence[tuple[str, str, float]], *options: str) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        path = folder / "steps.json"
        programs = [(name, program.replace("FOLDER", repr(str(folder))), limit) for name, program, limit in steps]
        path.write_text(json.dumps(programs))
        command = [sys.executable, str(PROGRAM), str(path), "--folder", str(self.logs), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPU_TEST_RUN": str(folder)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_started(self, step: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"{step}.started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str, dict[str, Any]]:
        """Exit status, output, and the last line of it."""
        output, _ = self.process.communicate(timeout=120)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return self.process.returncode, output, result

    def left(self) -> list[psutil.Process]:
        """Processes that the run has left behind: those with its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("GPU_TEST_RUN") == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """Though pytest may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["outcome"] for step in result["steps"]}


def test_every_outcome_is_logged_and_the_next_step_follows(tmp_path: Path) -> None:
    steps = [("good", GOOD, 60), ("bad", BAD, 60), ("broken", BROKEN, 60), ("skipped", SKIPPED, 60), ("last", GOOD, 60)]
    run = Run(tmp_path, steps)
    status, output, result = run.end()
    assert status == 1
    assert outcomes(result) == {
        "good": "passed", "bad": "failed", "broken": "failed", "skipped": "skipped", "last": "passed"
    }  # fmt: skip
    good, bad, broken, skipped, _ = result["steps"]
    assert good["figures"] == {"answers": 20}
    assert (bad["reason"], bad["figures"]) == ("three answers differ", {"equal": 0.7})
    assert broken["reason"] == "ValueError: heads do not divide"
    assert skipped["reason"] == "flashinfer is not installed"
    assert "    | first words\n" in output, "the end of a failed step's output"
    assert "2 passed, 2 failed, 1 skipped" in output
    assert json.loads((run.logs / "summary.json").read_text()) == result
    assert "first words" in (run.logs / "bad.log").read_text()


@pytest.mark.parametrize(("program", "status"), [(GOOD, 0), (SKIPPED, 0), (BAD, 1), (BROKEN, 1)])
def test_the_exit_status_is_1_if_anything_failed(tmp_path: Path, program: str, status: int) -> None:
    assert Run(tmp_path, [("one", program, 60), ("good", GOOD, 60)]).end()[0] == status


def test_a_step_that_hangs_is_killed_with_all_its_children(tmp_path: Path) -> None:
    run = Run(tmp_path, [("hangs", HANGS, 4), ("last", GOOD, 60)])
    run.wait_started("hangs")
    assert len(run.left()) == 4, "the run, the step, its child, and the orphan"
    status, _, result = run.end()
    assert status == 1
    assert outcomes(result) == {"hangs": "timed out", "last": "passed"}
    assert result["steps"][0]["reason"] == "killed when its time was up"
    assert result["steps"][0]["figures"] == {"questions": 3}, "what it had found by then"
    assert not run.left()


def test_a_step_is_interrupted_before_it_is_killed(tmp_path: Path) -> None:
    """So that a server removes its folders."""
    _, _, result = Run(tmp_path, [("tidy", TIDY, 2)]).end()
    assert outcomes(result) == {"tidy": "timed out"}
    assert result["steps"][0]["figures"] == {"tidied": True}


def test_what_a_step_leaves_behind_is_killed_before_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path, [("leaves", FAMILY, 60), ("hangs", HANGS, 60)])
    run.wait_started("hangs")
    assert len(run.left()) == 4, "nothing of the first step"
    run.process.send_signal(signal.SIGINT)
    run.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_run_with_the_summary_so_far(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path, [("good", GOOD, 60), ("hangs", HANGS, 60), ("never", GOOD, 60)])
    run.wait_started("hangs")
    run.process.send_signal(number)
    status, output, result = run.end()
    assert status == 130
    assert outcomes(result) == {"good": "passed", "hangs": "interrupted"}
    assert result["steps"][1]["figures"] == {"questions": 3}
    assert "1 passed, 1 interrupted" in output
    assert not run.left()


def test_a_run_under_nohup_goes_on_without_its_terminal(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = Run(tmp_path, [("hangs", HANGS, 4), ("last", GOOD, 60)])
    run.wait_started("hangs")
    run.process.send_signal(signal.SIGHUP)
    assert outcomes(run.end()[2]) == {"hangs": "timed out", "last": "passed"}


def test_a_budget_cuts_the_step_that_runs_and_those_after_it(tmp_path: Path) -> None:
    run = Run(tmp_path, [("good", GOOD, 60), ("hangs", HANGS, 600), ("late", GOOD, 60)], "--budget-minutes", "0.08")
    status, _, result = run.end()
    assert status == 1
    assert outcomes(result) == {"good": "passed", "hangs": "timed out", "late": "skipped"}
    assert result["steps"][1]["reason"] == "killed when the budget's time was up"
    assert result["steps"][2]["reason"] == "the budget is spent"
    assert not run.left()


# The plan


def test_steps_that_need_a_gpu_are_skipped_without_one(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    names = [check.name for check in CHECKS if check.num_gpus]
    assert len(names) > 8
    assert gpu.main(["--folder", str(tmp_path / "logs"), "--only", ",".join(names)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcomes(result) == dict.fromkeys(names, "skipped")
    reasons = {step["step"]: step["reason"] for step in result["steps"]}
    assert reasons.pop("tensor-parallel") == "no NVIDIA GPU, and it needs 2"
    assert set(reasons.values()) == {"no NVIDIA GPU"}


def test_one_gpu_and_its_tools_are_found_on_the_path(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    put(programs_folder, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 580.159.04, 81559'")
    options = ["--folder", str(tmp_path / "logs"), "--only", "tensor-parallel,memcheck", "--only", "profile-gpu"]
    assert gpu.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["gpus"] == ["NVIDIA H100 80GB HBM3, 80 GiB, driver 580.159.04"]
    assert {step["step"]: step["reason"] for step in result["steps"]} == {
        "tensor-parallel": "one NVIDIA GPU, and it needs 2",
        "memcheck": "compute-sanitizer is not found",
        "profile-gpu": "nsys is not found",
    }


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` within pytest: it must not take orphans, signals and variables from the process."""
    monkeypatch.setattr(gpu, "adopt_orphans", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "ENVIRONMENT", {})


def test_the_list_shows_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [check.name for check in CHECKS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "eagre"], "no step 'eagre'"),
        (["--budget-minutes", "0"], "a number above 0"),
        (["--budget-minutes", "nan"], "a number above 0"),
        (["--budget-minutes", "ten"], "a number above 0"),
        (["--model", "/no/such/folder"], "holds no config.json"),
    ],
)
def test_wrong_options_are_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(options)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_steps_run_in_the_order_of_the_plan_with_this_python(tmp_path: Path) -> None:
    steps = make_steps("m", tmp_path, 1, ["burst", "machine", "eager"])
    assert [step.name for step in steps] == ["machine", "eager", "burst"]
    assert all(step.command[:3] == (sys.executable, "-m", "benchmarks.gpu.check") for step in steps)
