"""The command line: what it accepts, and its sentences."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import published_configs
import pytest

from server import cli
from server import settings as settings_module
from server.http.listener import Address
from server.http.middleware import REQUEST_LOG
from server.settings import OTHER_VARIABLES, Settings
from vd_plugin import demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line writes the request log to the streams of the moment, which are a test's own here."""
    requests = logging.getLogger(REQUEST_LOG)
    handlers, level = requests.handlers[:], requests.level
    yield
    requests.handlers[:], requests.propagate = handlers, True
    requests.setLevel(level)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "run_serve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cli, "run_gateway", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    return calls


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def test_serve_passes_settings_address_and_engine_options(served: list[tuple[Any, ...]]) -> None:
    options = ("--port", "0", "--default-budget", "low", "--engine-log", "log", "--max-images", "3")
    assert run("serve", "model", *options, "--", "--max-model-len", "4096", "--", "x") == 0
    command = [sys.executable, "-m", "vd_plugin.engine", "model", "--max-model-len", "4096", "--", "x"]
    settings = Settings(default_budget="low", max_images_per_request=3)
    assert served == [(settings, Address("127.0.0.1", 0), command, Path("log"))]


@pytest.fixture
def demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo model that seems to be installed."""
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(demo, "MODEL_PATH", tmp_path)
    return tmp_path


def test_serve_without_a_model_takes_the_demo_model(
    served: list[tuple[Any, ...]], demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--port", "0", "--", "--max-num-seqs", "4") == 0
    command = [sys.executable, "-m", "vd_plugin.engine", str(demo_model)]
    assert served.pop()[2] == [*command, "--served-model-name=visiondrop-demo", "--max-num-seqs", "4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("visiondrop: no MODEL is named")
    assert "the demo model that comes with the package" in line


@pytest.mark.parametrize(
    "name", [["--served-model-name", "mine"], ["--served-model-name=mine"], ["--served_model_name", "mine"]]
)
def test_demo_model_can_have_another_name(served: list[tuple[Any, ...]], demo_model: Path, name: list[str]) -> None:
    assert run("serve", "--", *name) == 0
    assert served.pop()[2] == [sys.executable, "-m", "vd_plugin.engine", str(demo_model), *name]


def test_model_may_follow_options(served: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--port", "0", "m"], ["m", "--port", "0"], ["--port", "0", "m", "--max-images", "3"]):
        assert run("serve", *arguments) == 0
        assert served.pop()[2] == [sys.executable, "-m", "vd_plugin.engine", "m"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_missing_weights_get_a_sentence(
    served: list[tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(demo, "MODEL_PATH", tmp_path)
    assert run(command) == 1
    assert capsys.readouterr().err == (
        "visiondrop: error: the weights of the demo model are not installed here "
        f"(no {tmp_path}/model.safetensors): name a MODEL\n"
    )
    assert not served


def test_gateway_needs_an_engine_and_takes_several(
    served: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gateway", "--engine", "unix:/a", "--engine", "http://b:1") == 0
    urls = ("unix:/a", "http://b:1")
    assert served == [(Settings(engines=urls), Address("127.0.0.1", 8000), urls)]
    assert run("gateway") == 2
    assert "--engine" in capsys.readouterr().err


def test_gateway_takes_engines_from_the_environment(
    served: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISIONDROP_ENGINES", "http://a:1, http://B:2")
    assert run("gateway") == 0
    assert served.pop()[2] == ("http://a:1", "http://B:2")
    assert run("gateway", "--engine", "unix:/c") == 0
    assert served.pop()[2] == ("unix:/c",), "the command line wins"
    monkeypatch.setenv("VISIONDROP_ENGINES", " , ")
    assert run("gateway") == 1
    assert "no engine is given" in capsys.readouterr().err


def test_environment_sets_defaults_and_the_command_line_wins(
    served: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISIONDROP_DEFAULT_BUDGET", "100")
    monkeypatch.setenv("VISIONDROP_MAX_IMAGE_PIXELS", "1000")
    run("serve", "model")
    run("serve", "model", "--default-budget", "full")
    assert [(call[0].default_budget, call[0].max_image_pixels) for call in served] == [(100, 1000), ("full", 1000)]


def test_limits_have_options_of_their_own(served: list[tuple[Any, ...]], tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[keys.shop]\nsecret = "a-secret"\n')
    keys.chmod(0o600)
    limits = (
        "--max-budget",
        "medium",
        "--shutdown-seconds",
        "2.5",
        "--metrics-port",
        "9",
        "--api-keys-file",
        str(keys),
    )
    assert run("serve", "model", *limits) == 0
    expected = Settings(max_budget="medium", shutdown_seconds=2.5, metrics_port=9, api_keys_file=keys)
    assert served[0][0] == expected


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "m", "another"], 2, "another"),
        (["serve", "m", "--port", "99999"], 2, "from 0 to 65535"),
        (["serve", "m", "--max-model-len", "1"], 2, "go after --"),
        (["serve", "m", "--default-budget", "lots"], 1, "at least 32"),
        (["serve", "m", "--default-budget", "31"], 1, "VISIONDROP_DEFAULT_BUDGET"),
        (["serve", "m", "--max-images", "none"], 1, "valid integer"),
        (["serve", "m", "--max-budget", "31"], 1, "VISIONDROP_MAX_BUDGET"),
        (["serve", "m", "--metrics-port", "99999"], 1, "VISIONDROP_METRICS_PORT"),
        (["serve", "m", "--shutdown-seconds", "-1"], 1, "VISIONDROP_SHUTDOWN_SECONDS"),
        (["serve", "m", "--api-keys-file", "/nowhere/keys.toml"], 1, "/nowhere/keys.toml"),
        (["serve", "m", "--", "--port", "1"], 2, "before the --"),
        (["serve", "m", "--", "--uds=/a"], 2, "socket of its own"),
        (["gateway", "--engine", "unix:/a", "--", "--x"], 2, "does not"),
        (["dance"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_wrong_usage_gets_a_sentence(
    served: list[tuple[Any, ...]],
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    status: int,
    words: str,
) -> None:
    assert run(*arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("visiondrop: error: ")
    assert words in error
    assert not served


def test_wrong_engine_url_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gateway", "--port", "0", "--engine", "localhost:1") == 1
    assert capsys.readouterr().err == (
        "visiondrop: error: an engine's URL is http://HOST:PORT or unix:/PATH; got 'localhost:1'\n"
    )


def test_engine_that_is_given_twice_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    engines = ("--engine", "http://a:1", "--engine", "unix:/b", "--engine", "http://a:1/")
    assert run("gateway", "--port", "0", *engines) == 1
    assert capsys.readouterr().err == "visiondrop: error: the engine http://a:1/ is duplicated\n"


def test_engine_that_never_comes_ends_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gateway", "--port", "0", "--engine", "unix:/no", "--engine-start-timeout", "0.1") == 1
    assert "not ready after 0.1 s" in capsys.readouterr().err
    two = ("--engine", "unix:/no", "--engine", "unix:/nowhere")
    assert run("gateway", "--port", "0", *two, "--engine-start-timeout", "0.1") == 1
    assert "not ready after 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_help_tells_where_all_limits_are_set(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "--help")
    assert "VISIONDROP_*" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["serve"], ["gateway"], ["demo"]])
def test_every_option_is_explained(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    assert capsys.readouterr().out
    parser = cli._make_parser(with_demo=True)
    subparsers = next(iter(parser._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert all(action.help for sub in subparsers.values() for action in sub._actions)  # type: ignore[union-attr]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("visiondrop ")


@pytest.mark.parametrize("tool", ["explain", "plan"])
def test_tools_run_in_a_process_of_their_own(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run_command(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run_command)
    given = ["image.png", "--budget", "low", "--", "--dtype", "float32"]
    assert run(tool, *given) == 2
    assert commands == [[sys.executable, "-m", f"vd_plugin.tools.{tool}", *given]]


@pytest.mark.parametrize(("gib", "status"), [("80", 0), ("14", 1), ("much", 2)])
def test_plan_answers_with_the_status_of_the_plan(
    gib: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_configs.VICUNA_7B))
    assert run("plan", str(tmp_path), "--gpu-memory", gib) == status
    out, err = capfd.readouterr()
    assert out.count("VISIONDROP_MAX_INFLIGHT_TOKENS=") == (status == 0)
    assert err.count("visiondrop: error: ") == (status != 0)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in ("serve", "gateway", "demo", "plan", "explain"))


def test_odd_images_write_nothing_and_are_not_remembered(tmp_path: Path) -> None:
    script = tmp_path / "odd.py"
    script.write_text(
        "import struct, PIL.Image\n"
        "from contextlib import suppress\n"
        "from images import png\n"
        "from server import cli\n"
        "from server.images.check import check_image_bytes\n"
        "from server.settings import Settings\n"
        "cli._configure_logging()\n"
        "for width in range(9000, 9100):\n"
        "    with suppress(Exception):\n"
        "        check_image_bytes(png(width, 10_000, 8, 2, b''), Settings(), 'here')\n"
        "print([key for key in vars(PIL.Image).get('__warningregistry__', ()) if key != 'version'])\n"
    )
    path = os.pathsep.join((str(Path(__file__).parents[1] / "support"), str(Path(cli.__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["VISIONDROP_API_KEY_FILE"], "VISIONDROP_API_KEY_FILE (did you mean VISIONDROP_API_KEYS_FILE?)"),
        (["visiondrop_queue_second"], "visiondrop_queue_second (did you mean VISIONDROP_QUEUE_SECONDS?)"),
        (["VISIONDROP_ZZ", "VISIONDROP_MAX_BUGDET"], "VISIONDROP_MAX_BUDGET?), VISIONDROP_ZZ."),
    ],
)
@pytest.mark.parametrize("command", [["serve", "model"], ["gateway", "--engine", "unix:/a"]])
def test_misspelt_setting_ends_the_start(
    served: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    names: list[str],
    words: str,
) -> None:
    for name in names:
        monkeypatch.setenv(name, "secret")
    assert run(*command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("visiondrop: error: ")
    assert words in line
    assert "secret" not in line
    assert not served


def test_every_variable_that_the_project_names_is_known(
    served: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its programs, units and documents, and of nothing else."""
    settings = {f"VISIONDROP_{name.upper()}" for name in Settings.model_fields}
    places = ("server", "vd_plugin", "deploy", "docs", "Makefile", "Dockerfile", "docker-compose.yml", ".env.example")
    files = [file for place in places for file in (ROOT / place, *(ROOT / place).rglob("*")) if file.is_file()]
    texts = {file: file.read_text() for file in files if file.suffix not in (".pyc", ".png", ".safetensors", ".model")}
    named = {name for text in texts.values() for name in re.findall(r"VISIONDROP_[A-Z_]*[A-Z]", text)}
    assert named == settings | OTHER_VARIABLES
    for name in OTHER_VARIABLES:
        assert any(name in text for file, text in texts.items() if file != Path(settings_module.__file__))
        monkeypatch.setenv(name, "1")
    assert run("serve", "model") == 0
