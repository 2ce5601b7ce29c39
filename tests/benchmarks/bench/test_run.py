"""The command: what it measures, saves and reports; parts are replaced by stand-ins that need no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_results import result_of

from benchmarks.bench import __main__ as bench
from benchmarks.bench import serve
from benchmarks.bench.report import PARTS
from benchmarks.bench.settings import Settings


class Parts:
    """Notes what is measured; may fail at one part."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.broken: str | None = None

    def measure(self, part: str, settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
        if part == self.broken:
            raise RuntimeError("the engine died")
        self.measured.append(part)
        advance()
        return result_of(part)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    stand_in = Parts()
    monkeypatch.setattr(bench, "measure", stand_in.measure)
    return stand_in


Run = Callable[..., int]


@pytest.fixture
def run(random_model: Path, tmp_path: Path) -> Run:
    """The command with the random checkpoint, which is there already."""
    return lambda *arguments: bench.main(["--out", str(tmp_path), "--model", str(random_model), *arguments])


def test_all_parts_are_measured_and_the_last_line_is_json(
    parts: Parts, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert parts.measured == list(PARTS)
    printed = capsys.readouterr().out.splitlines()
    assert set(json.loads(printed[-1])["results"]) == set(PARTS)
    assert any(line.startswith("met ") for line in printed)
    assert (tmp_path / "bench.png").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was(
    parts: Parts, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    parts.broken = "decode"
    with pytest.raises(RuntimeError, match="died"):
        run()
    parts.broken = None
    capsys.readouterr()
    run()
    assert parts.measured == list(PARTS)
    assert "measured before: flops, prefill, throughput (--only" in capsys.readouterr().err


def test_a_part_that_is_named_is_measured_again_and_the_others_are_reported_as_saved(
    parts: Parts, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--only", "flops,prefill")
    run("--only", "prefill")
    assert parts.measured == ["flops", "prefill", "prefill"]
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["results"]) == {"flops", "prefill"}


@pytest.mark.parametrize("change", [("--dtype", "float16"), ("--rounds", "3"), ("--no-eager",)])
def test_another_setting_shares_no_results(parts: Parts, run: Run, change: tuple[str, ...]) -> None:
    run("--only", "flops")
    run(*change)
    assert parts.measured == ["flops", *PARTS]


def test_other_code_shares_no_results(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("code/vd_plugin", "code/docs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path / "code")
    first = bench.run_key("machine")
    (tmp_path / "code" / "docs" / "notes.py").write_text("")
    assert bench.run_key("machine") == first
    (tmp_path / "code" / "vd_plugin" / "decoder.py").write_text("faster = True\n")
    assert bench.run_key("machine") != first


def test_a_slice_and_the_whole_share_no_results(parts: Parts, tmp_path: Path) -> None:
    for shape in ("slice", "7b"):
        bench.main(["--out", str(tmp_path), "--shape", shape, "--only", "flops"])
    assert len({path.parent for path in tmp_path.rglob("flops.json")}) == 2


def test_an_unknown_part_ends_with_a_sentence(parts: Parts, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "speed") == 2
    assert "bench: there is no part 'speed'" in capsys.readouterr().err
    assert parts.measured == []


def test_an_entry_names_the_command_and_goes_into_the_log_only_when_asked(
    parts: Parts, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, plot = tmp_path / "LOG.md", tmp_path / "images" / "bench.png"
    log.write_text("# Measurements\n\n## old\n")
    monkeypatch.setattr(bench, "LOG", log)
    monkeypatch.setattr(bench, "PLOT", plot)
    run()
    assert log.read_text() == "# Measurements\n\n## old\n"
    run("--log")
    entry = log.read_text()
    assert "make bench ARGS='--out" in entry
    assert entry.endswith("\n## old\n")
    assert "(images/bench.png)" in entry
    assert plot.exists()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("avx2 avx512f", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), (None, "bfloat16")],
)
def test_bfloat16_only_where_the_hardware_has_it(flags: str | None, dtype: str) -> None:
    assert bench.default_dtype(flags) == dtype


@pytest.mark.parametrize(
    ("on_gpu", "said", "eager"),
    [(False, None, True), (True, None, False), (True, "1", True), (False, "0", False)],
)
def test_graphs_are_off_on_a_cpu_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, said: str | None, eager: bool
) -> None:
    monkeypatch.delenv("VISIONDROP_TEST_EAGER", raising=False)
    if said is not None:
        monkeypatch.setenv("VISIONDROP_TEST_EAGER", said)
    assert bench.default_eager(on_gpu) is eager


def test_vllms_own_client_knows_every_option_that_it_is_given(tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    command = serve.bench_serve_command("http://127.0.0.1:1", 320, tmp_path / "320.json", 10)
    assert command[:2] == ["bench", "serve"]
    options = parser.parse_args(command[2:])
    assert options.extra_body == {"visual_token_budget": 320}
    assert options.random_mm_bucket_config == {(448, 448, 1): 1.0}
    assert options.dataset_name == "random-mm"
