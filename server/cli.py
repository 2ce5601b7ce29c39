"""The command `visiondrop`."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from server.admission.keys import ApiKeys
from server.errors import first_complaint
from server.http.listener import Address, StartError
from server.http.middleware import REQUEST_LOG
from server.launcher.output import LineFormatter, queued_output
from server.launcher.serve import run_gateway, run_serve, say, say_error
from server.settings import OTHER_VARIABLES, Settings
from server.telemetry.tracing import make_tracing
from server.version import package_version
from vd_plugin.demo import MODEL_NAME, find_model
from vd_plugin.schedule import PRESETS
from vd_plugin.wire import ERROR_PREFIX

_RESERVED_OPTIONS: Final = {
    "--uds": "the gateway talks to its engine over a socket of its own",
    "--host": "give --host before the --",
    "--port": "give --port before the --",
    "--model": "the model is named before the --",
    "--api-key": "only the gateway can reach its engine",
}
"""vLLM options that may not stand after `--`, and why."""

_PREFIX: Final = Settings.model_config["env_prefix"]

_TOOLS: Final = {
    "plan": "compute how many images and tokens an engine will hold, and the settings to use",
    "explain": "draw which patches of an image every stage keeps",
}
"""Commands of the plugin, and what they are for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 after a clean stop, 1 for a failure, 2 for wrong usage."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in _TOOLS:
        # In a process of its own, with all that this package does not import.
        command = [sys.executable, "-m", f"vd_plugin.tools.{given[0]}", *given[1:]]
        return subprocess.run(command, check=False).returncode
    arguments, engine_options = _split_engine_options(given)
    parser = _make_parser(with_demo=arguments[:1] == ["demo"])
    options = parser.parse_args(arguments)
    options.engine_options = engine_options
    if engine_options and options.command == "gateway":
        parser.error("engine options belong to the command that starts the engine; `gateway` does not")
    for option in engine_options:
        if (name := option.partition("=")[0]) in _RESERVED_OPTIONS:
            parser.error(f"engine option {name}: {_RESERVED_OPTIONS[name]}")
    serves = options.command in ("serve", "gateway")
    with queued_output() if serves else nullcontext():
        try:
            return int(options.run(options))
        except (StartError, SettingsError) as error:
            say_error(error)
            return 1
        except KeyboardInterrupt:
            return 130


class SettingsError(Exception):
    """A setting that cannot be used. The message is a sentence."""


def engine_command(model: str, engine_options: Sequence[str]) -> list[str]:
    """How the engine is started; the supervisor adds the socket."""
    return [sys.executable, "-m", "vd_plugin.engine", model, *engine_options]


def _demo_command(engine_options: Sequence[str]) -> list[str]:
    """How the engine is started where no model is named.

    Raises:
        SettingsError: the weights of the demo model are not installed.
    """
    try:
        model = find_model()
    except FileNotFoundError as error:
        raise SettingsError(str(error)) from None
    say("no MODEL is named (a folder, or a name on the hub): this is the demo model that comes with the package")
    given = {option.partition("=")[0].replace("_", "-") for option in engine_options}
    name = [] if "--served-model-name" in given else [f"--served-model-name={MODEL_NAME}"]
    return engine_command(str(model), [*name, *engine_options])


def _split_engine_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += " (options of the engine go after --, as in: visiondrop serve MODEL -- --max-model-len 4096)"
        self.exit(2, f"{ERROR_PREFIX}{message}\nTry: {self.prog} --help\n")


def _make_parser(*, with_demo: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="visiondrop",
        description="Serve LLaVA models with a visual token budget for every request.",
        epilog=_SETTINGS_NOTE,
    )
    parser.add_argument("--version", action="version", version=f"visiondrop {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="start an engine and serve it", usage=_SERVE_USAGE))
    _add_gateway(commands.add_parser("gateway", help="serve engines that run elsewhere"))
    _add_demo(commands.add_parser("demo", help="serve a model, ask it about images, show the savings"), with_demo)
    for name, purpose in _TOOLS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


_SETTINGS_NOTE: Final = (
    "All limits can be set by environment variables VISIONDROP_*, for example VISIONDROP_MAX_IMAGE_PIXELS=20000000."
)
_SERVE_USAGE: Final = "visiondrop serve [MODEL] [options] [-- ENGINE OPTIONS]"


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Start vLLM with VisionDrop as a child process and serve it over HTTP."
    parser.epilog = (
        "What follows -- goes to vLLM as it is, for example: -- --max-model-len 4096 --dtype bfloat16. "
        "An engine that stops while it serves is started again. " + _SETTINGS_NOTE
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder with a LLaVA checkpoint, or its name on the hub "
        f"(default: the demo model that comes with the package, served as {MODEL_NAME})",
    )
    _add_server_options(parser)
    parser.add_argument(
        "--engine-log",
        type=Path,
        metavar="PATH",
        help="file for the engine's output (default: in a private folder, kept only if the engine fails); "
        "when the engine is started again, the next file has a number in its name",
    )
    parser.set_defaults(run=_serve)


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve engines that were started with `python -m vd_plugin.engine` elsewhere."
    parser.epilog = _SETTINGS_NOTE
    parser.add_argument(
        "--engine",
        required=not os.environ.get("VISIONDROP_ENGINES"),
        action="append",
        metavar="URL",
        dest="engines",
        help="where an engine is: http://HOST:PORT or unix:/PATH; more than once for several that serve the same model "
        "(default: those of VISIONDROP_ENGINES, separated by commas)",
    )
    _add_server_options(parser)
    parser.set_defaults(run=_gateway)


def _add_demo(parser: argparse.ArgumentParser, is_wanted: bool) -> None:
    if not is_wanted:
        return
    # Imported late: it needs the openai client, which a server does not.
    from server import demo

    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(f"{name} ({rows})" for name, rows in PRESETS.items())
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for any (default: %(default)s)")
    parser.add_argument(
        "--default-budget",
        metavar="BUDGET",
        help="visual token budget of requests that set none: an integer from 32 up, "
        f"or {presets}, full (default: high)",
    )
    parser.add_argument(
        "--max-budget",
        metavar="BUDGET",
        help=f"larger budgets are capped to it (default: {_default('max_budget')})",
    )
    parser.add_argument(
        "--max-images",
        metavar="N",
        dest="max_images_per_request",
        help=f"images that a request may have (default: {_default('max_images_per_request')})",
    )
    parser.add_argument(
        "--engine-start-timeout",
        metavar="SECONDS",
        dest="engine_start_timeout_seconds",
        help=f"how long the engine may take to load (default: {_default('engine_start_timeout_seconds'):g})",
    )
    parser.add_argument(
        "--shutdown-seconds",
        metavar="SECONDS",
        help=f"what requests in flight get to finish when the server is stopped (default: "
        f"{_default('shutdown_seconds'):g})",
    )
    parser.add_argument(
        "--api-keys-file", metavar="PATH", help="TOML file of the keys that requests need (default: none is needed)"
    )
    parser.add_argument(
        "--metrics-port",
        metavar="PORT",
        help=f"port of its own for /metrics, on {_default('metrics_host')}, 0 for any (default: on the main port)",
    )


def _default(name: str) -> Any:
    return Settings.model_fields[name].default


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535; got {text!r}")


def _serve(options: argparse.Namespace) -> int:
    settings = _read_settings(options)
    _configure_logging()
    if options.model is None:
        command = _demo_command(options.engine_options)
    else:
        command = engine_command(options.model, options.engine_options)
    run_serve(settings, Address(options.host, options.port), command, options.engine_log)
    return 0


def _gateway(options: argparse.Namespace) -> int:
    settings = _read_settings(options)
    if not settings.engines:
        raise SettingsError("no engine is given: name one with --engine URL, or in VISIONDROP_ENGINES")
    _configure_logging()
    run_gateway(settings, Address(options.host, options.port), settings.engines)
    return 0


def _read_settings(options: argparse.Namespace) -> Settings:
    """Command line over environment over defaults.

    Raises:
        SettingsError: a name is unknown, a value is out of range, or what it names cannot be used.
    """
    _check_variables()
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        location, _, reason = first_complaint(error)
        name = ".".join(str(step) for step in location)
        raise SettingsError(f"setting {name} (VISIONDROP_{name.upper()}): {reason}" if name else reason) from None
    try:
        # Now, and not after the minutes that an engine may take to load.
        ApiKeys.from_settings(settings)
        make_tracing(settings).close()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return settings


def _check_variables() -> None:
    """A misspelt limit would otherwise be no limit, and a misspelt key file an open server.

    Raises:
        SettingsError: a variable begins as settings do and is none.
    """
    known = {name.upper().removeprefix(_PREFIX) for name in (*Settings.model_fields, *OTHER_VARIABLES)}
    unknown = []
    for variable in sorted(variable for variable in os.environ if variable.upper().startswith(_PREFIX)):
        name = variable.upper().removeprefix(_PREFIX)
        if name not in known:
            similar = difflib.get_close_matches(name, known, 1)
            unknown.append(variable + (f" (did you mean {_PREFIX}{similar[0]}?)" if similar else ""))
    if unknown:
        what = "this variable is no setting" if len(unknown) == 1 else "these variables are no settings"
        raise SettingsError(f"{what}: {', '.join(unknown)}. docs/operations.md lists all that there are")


def _configure_logging() -> None:
    """Sentences go to standard error, the request log (one JSON object a line) to standard output."""
    people = logging.StreamHandler(sys.stderr)
    people.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[people])
    requests = logging.getLogger(REQUEST_LOG)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests.addHandler(handler)
    requests.setLevel(logging.INFO)
    requests.propagate = False
    # Pillow's warnings about odd images quote numbers from the file: each would be a line, and be remembered for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")


if __name__ == "__main__":
    sys.exit(main())
