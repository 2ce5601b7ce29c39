"""Exact match of the demo model at each visual token budget, through the real engine in this process: `make accuracy`.

Asks the questions of the evaluation split (vd_plugin/demo/split.py) at temperature 0, image by image, and compares the
answers as `questions.normalize` sees them. Writes OUT/accuracy.json, OUT/images/accuracy.png and the tables of
OUT/accuracy.md; the page's prose is left alone.

    python benchmarks/accuracy.py [--questions 1200] [--budgets full high 64] [--report-only] [--record-bounds]

Every answer is appended to .cache/accuracy/answers.jsonl at once, under a key of all that it depends on: a run that was
stopped goes on where it was, and one with more questions or budgets asks only those that are missing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy_answers import (
    MAX_TOKENS,
    Answer,
    AnswerFile,
    Setting,
    answer_key,
    model_digest,
    package_version,
)
from benchmarks.accuracy_report import (
    Column,
    Report,
    draw_plot,
    make_report,
    make_tables,
    progress_line,
    replace_tables,
)
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.scenes import draw
from vd_plugin.demo.split import Example, evaluation_split, fingerprint
from vd_plugin.options import OPTIONS_KEY, engine_args, load_config, read_geometry
from vd_plugin.schedule import FULL, Geometry, parse_budget, read_budget, resolve
from vd_plugin.wire import BUDGET_KEY

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "accuracy.md"
ANSWERS: Final = ROOT / ".cache" / "accuracy" / "answers.jsonl"
BOUNDS: Final = ROOT / "tests" / "vd_plugin" / "engine" / "accuracy_bounds.json"

ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",  # tiny matrices, and most of the time goes to Triton's interpreter, which has one thread
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

SETTINGS: Final = (
    *(Setting(name, parse_budget(name)) for name in ("full", "high", "medium", "low")),
    Setting("64", 64),
)
"""The first is the one that the others are compared with."""

TESTED: Final = tuple(setting for setting in SETTINGS if setting.name in ("full", "high", "low"))
"""What tests/vd_plugin/engine/test_accuracy.py repeats, on TESTED_QUESTIONS questions."""
TESTED_QUESTIONS: Final = 96


# The engine


def engine_arguments(model: str | Path, setting: Setting, batch: int = 16) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for a setting.

    Args:
        batch: requests that are decoded together.
    """
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "distributed_executor_backend": "uni",
        "dtype": "float32",
        "enforce_eager": current_platform.is_cpu(),
        "max_model_len": 4096,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": batch,
        "skip_mm_profiling": True,
        "use_tqdm_on_load": False,
        **setting.engine,
    }
    return engine_args(str(model), **arguments)


def read_setting_geometry(model: str | Path, setting: Setting) -> Geometry:
    """Geometry of the model as the setting's engine has it."""
    config = load_config(str(model))
    setattr(config, OPTIONS_KEY, dict(setting.engine.get("visiondrop", {})))
    return read_geometry(config)


def ask(llm: Any, model: str | Path, asked: Sequence[tuple[Example, Setting]], batch: int = 16) -> Iterator[Answer]:
    """Answers of a running `vllm.LLM`, as they come.

    Args:
        model: the checkpoint that the engine serves, a folder.
        asked: what to ask; questions about one image best follow one another. All settings have the engine's options.
        batch: twice as many requests are under way at a time.
    """
    from vllm import SamplingParams

    if not asked:
        return
    digest = model_digest(model)
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    image_token = engine.model_config.hf_config.image_token_index
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    draw_once = functools.lru_cache(maxsize=4)(draw)
    geometry = read_setting_geometry(model, asked[0][1])
    waiting = deque(asked)
    under_way: dict[str, tuple[Example, Setting]] = {}
    # The prefix cache holds an image in full once a request with it is computed, but not for another one of the same
    # step: the first question about an image goes ahead, the others are held until it is answered.
    held: dict[tuple[int, str], list[tuple[Example, Setting]]] = {}
    computed: set[tuple[int, str]] = set()
    while waiting or under_way:
        while len(under_way) < 2 * batch and waiting:
            example, setting = waiting.popleft()
            if setting.budget == FULL:
                image = (example.scene.seed, setting.name)
                if image in held:
                    held[image].append((example, setting))
                    continue
                if image not in computed:
                    held[image] = []
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question.text}]}
            prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            request_id = f"{setting.name}-{example.number}"
            request = {
                "prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False),
                "multi_modal_data": {"image": draw_once(example.scene)},
                "mm_processor_kwargs": {BUDGET_KEY: setting.budget},
            }
            engine.add_request(request_id, request, params)
            under_way[request_id] = (example, setting)
        for output in engine.step():
            if not output.finished:
                continue
            example, setting = under_way.pop(output.request_id)
            scene, question = example.scene, example.question
            if (followers := held.pop((scene.seed, setting.name), None)) is not None:
                computed.add((scene.seed, setting.name))
                waiting.extendleft(reversed(followers))
            schedule = resolve(geometry, scene.height, scene.width, setting.budget)
            # The budget was honoured, or the figures would be about something else.
            assert output.prompt_token_ids.count(image_token) == schedule.num_placeholders, output.request_id
            yield Answer(
                key=answer_key(digest, setting, example),
                number=example.number,
                setting=setting.name,
                budget=setting.budget,
                kept=schedule.kept,
                kind=question.kind,
                question=question.text,
                expected=question.answer,
                answer=output.outputs[0].text.strip(),
            )


def order(examples: Sequence[Example], settings: Sequence[Setting]) -> list[tuple[Example, Setting]]:
    """Image by image, and for each image setting by setting.

    Questions that share what the encoder made of an image stand together; a run that is stopped has asked all settings
    about the same images; and the time left can be told, though settings take unequally long.
    """
    groups = [list(group) for _, group in groupby(examples, key=lambda example: example.scene.seed)]
    return [(example, setting) for group in groups for setting in settings for example in group]


def ask_missing(
    model: Path, examples: Sequence[Example], settings: Sequence[Setting], answers: AnswerFile, batch: int
) -> None:
    """Ask what the file does not hold yet, with a progress bar on standard error."""
    digest = model_digest(model)
    missing = [pair for pair in order(examples, settings) if answers.get(answer_key(digest, pair[1], pair[0])) is None]
    total = len(examples) * len(settings)
    print(f"{total - len(missing):,} of {total:,} answers are there, {len(missing):,} to ask", file=sys.stderr)
    progress = Progress(len(missing))

    def accept(answer: Answer) -> None:
        answers.add(answer)
        progress.advance()

    for _, group in groupby(sorted(missing, key=lambda pair: pair[1].engine_key), key=lambda pair: pair[1].engine_key):
        ask_engine(model, list(group), batch, accept)
    progress.end()


def ask_engine(
    model: Path, pairs: Sequence[tuple[Example, Setting]], batch: int, accept: Callable[[Answer], None]
) -> None:
    """Ask a fresh engine, which ends with it; all settings have the same options."""
    from vllm import LLM

    llm = LLM(**engine_arguments(model, pairs[0][1], batch))
    for answer in ask(llm, model, pairs, batch):
        accept(answer)
    llm.llm_engine.renderer.shutdown()
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


class Progress:
    """A bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, total: int, seconds_between: float = 30) -> None:
        self._total, self._done = total, 0
        self._is_terminal = sys.stderr.isatty()
        self._between = 0.5 if self._is_terminal else seconds_between
        self._start: float | None = None
        self._shown = time.monotonic()

    def advance(self) -> None:
        now = time.monotonic()
        if self._start is None:  # the engine's start and the first batch are not its pace
            self._start = now
            self._total -= 1
            return
        self._done += 1
        if now - self._shown >= self._between or self._done == self._total:
            self._shown = now
            line = progress_line(self._done, self._total, now - self._start)
            print(
                f"\r{line:<79}" if self._is_terminal else line,
                end="" if self._is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def end(self) -> None:
        if self._is_terminal and self._done:
            print(file=sys.stderr)


# The report


def collect(
    model: Path, examples: Sequence[Example], settings: Sequence[Setting], answers: AnswerFile
) -> tuple[Report, dict[str, list[Answer]]]:
    """The report over all answers, and the answers themselves by setting.

    Raises:
        ValueError: some have not been asked.
    """
    digest = model_digest(model)
    found: dict[str, list[Answer]] = {}
    columns = []
    for setting in settings:
        held = [answers.get(answer_key(digest, setting, example)) for example in examples]
        found[setting.name] = complete = [answer for answer in held if answer is not None]
        if len(complete) < len(held):
            raise ValueError(
                f"{len(held) - len(complete)} of {len(held)} questions have not been asked at {setting.name}"
            )
        kept = sum(answer.kept for answer in complete) / len(complete)
        columns.append(Column(setting.name, setting.budget, kept, [answer.is_right for answer in complete]))
    details = {
        "model": digest,
        "split": {"questions": len(examples), "digest": fingerprint(list(examples))},
        "versions": {"vllm": package_version("vllm"), "pillow": package_version("pillow")},
    }
    return make_report(examples, columns, read_setting_geometry(model, settings[0]), details), found


def write_report(report: Report, out: Path) -> None:
    """The page, the plot and the figures. A page that is not there yet begins as a copy of docs/accuracy.md."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE.name
    text = (page if page.exists() else PAGE).read_text()
    page.write_text(replace_tables(text, make_tables(report)))
    page.with_suffix(".json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    draw_plot(report, out / "images" / "accuracy.png")


def write_bounds(path: Path, model: str, examples: Sequence[Example], found: Mapping[str, Sequence[Answer]]) -> None:
    """What the test of the answers compares with."""
    bounds = {
        "model": model,
        "split": fingerprint(list(examples)),
        "right": {name: sum(answer.is_right for answer in answers) for name, answers in found.items()},
        "answers": {name: [answer.answer for answer in answers] for name, answers in found.items()},
    }
    path.write_text(json.dumps(bounds, indent=1, ensure_ascii=False) + "\n")


def parse_settings(names: Sequence[str]) -> list[Setting]:
    """Settings by name, others by their budget, a number.

    Raises:
        ValueError: neither.
    """
    known = {setting.name: setting for setting in SETTINGS}
    return [known.get(name) or Setting(name, read_budget(name)) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=MODEL_PATH, help="folder of the checkpoint (default the demo model)"
    )
    parser.add_argument("--questions", type=int, default=1200, help="how many, best a multiple of 12 (default 1200)")
    parser.add_argument(
        "--budgets", nargs="+", default=[setting.name for setting in SETTINGS], metavar="BUDGET",
        help="full, high, medium, low or a number; the first is what the others are compared with (default all and 64)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder of page, figures and plot (default docs)")
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="file of answers (default .cache/accuracy/...)")
    parser.add_argument("--batch", type=int, default=16, help="requests that are decoded together (default 16)")
    parser.add_argument("--report-only", action="store_true", help="ask nothing, write the report of what is there")
    parser.add_argument("--record-bounds", action="store_true", help="record what the engine's test compares with")
    arguments = parser.parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        if arguments.record_bounds:
            settings, count = list(TESTED), TESTED_QUESTIONS
        else:
            settings, count = parse_settings(arguments.budgets), arguments.questions
        examples = evaluation_split(count)
        answers = AnswerFile(arguments.answers)
        if not arguments.report_only:
            ask_missing(arguments.model, examples, settings, answers, arguments.batch)
        report, found = collect(arguments.model, examples, settings, answers)
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    if arguments.record_bounds:
        write_bounds(BOUNDS, model_digest(arguments.model), examples, found)
        print(f"{BOUNDS}: " + ", ".join(f"{c.name} {sum(c.right)}" for c in report.columns) + f" of {count} right")
        return 0
    write_report(report, arguments.out)
    print(make_tables(report)["kinds"])
    print(
        json.dumps(
            {"benchmark": "accuracy", "exact_match": {c.name: report.share(c).to_dict() for c in report.columns}}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
