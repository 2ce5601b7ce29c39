"""Tables, marks, the entry of the log, the plot, the line of JSON: of results that were not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_results import prefill_result, result_of

from benchmarks.bench import __main__ as bench
from benchmarks.bench import prefill, serve
from benchmarks.bench.report import PARTS, Report, add_entry, draw_plot, plan_parts

LOG = Path(bench.ROOT, "benchmarks", "LOG.md")


def report(*parts: str) -> Report:
    results = {part: result_of(part) for part in parts or PARTS}
    return Report("2026-01-02", "make bench", "abc1234", "2 cores of a CPU", "A slice, bfloat16", results)


def marks_of(**changes: float) -> dict[str, bool]:
    return {mark.name: mark.is_met for mark in prefill.marks(prefill_result(**changes))}


def test_every_mark_is_met_by_the_limit_itself() -> None:
    assert all(marks_of().values())


def test_a_prefill_above_the_limit_misses_that_mark_alone() -> None:
    missed = [name for name, is_met in marks_of(over_limit=1.09).items() if not is_met]
    assert missed == [f"TTFT ours / limit at {budget}" for budget in (640, 320, 160)]


def test_a_full_image_or_a_text_slower_than_stock_misses_that_mark_alone() -> None:
    missed = [name for name, is_met in marks_of(over_stock=1.04).items() if not is_met]
    assert missed == ["TTFT in full, ours / stock", "TTFT of text alone, ours / stock"]


def test_a_prefill_too_slow_against_stock_misses_its_mark() -> None:
    assert not marks_of(over_limit=1.2)["TTFT stock / ours at 640"]


def test_the_issues_marks_are_all_there() -> None:
    bounds = {mark.name: (mark.bound, mark.at_least) for mark in report().marks}
    assert bounds == {
        "FLOPs of the 7B decoder, full / 320": (6.0, True),
        "TTFT stock / ours at 640": (3.5, True),
        "TTFT stock / ours at 320": (4.9, True),
        "TTFT stock / ours at 160": (6.1, True),
        "TTFT ours / limit at 640": (1.08, False),
        "TTFT ours / limit at 320": (1.08, False),
        "TTFT ours / limit at 160": (1.08, False),
        "TTFT in full, ours / stock": (1.03, False),
        "TTFT of text alone, ours / stock": (1.03, False),
        "requests per second in the same KV cache, 320 / stock": (4.0, True),
        "seconds that the gateway adds to a first token, the image's check apart": (0.01, False),
    }


def test_the_gateways_share_leaves_out_the_check_of_the_image() -> None:
    result = result_of("serve")
    (mark,) = serve.marks(result)
    assert mark.value == pytest.approx(0.0117 - 0.002)
    assert mark.is_met
    (mark,) = serve.marks({**result, "measured": "cpu_seconds"})
    assert mark.value == pytest.approx(0.012 - 0.002)


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    for part, module in PARTS.items():
        tables = [text for text in module.table(result_of(part)).split("\n\n") if text.startswith("|")]
        assert tables
        for table in tables:
            head, *rows = table.splitlines()
            assert {row.count("|") for row in rows} == {head.count("|")}, part


def test_a_table_shows_ratios_within_rounds() -> None:
    assert (
        "| 320 | 2.700 (2.250 to 3.150) | 5.56 (5.56 to 5.56) | 6.45 | 1.00 (1.00 to 1.00) | 0.90 |"
        in report().tables()
    )


def test_what_happens_once_in_any_depth_is_not_multiplied() -> None:
    """Of the slice's 1.8 s at 320, 0.1 are the projector's and 0.2 pruning's."""
    result = prefill_result()
    assert prefill.at_whole_depth(result, "320")[0] == pytest.approx(8 * 1.5 + 0.3)
    assert prefill.at_whole_depth(result, "limit 320")[0] == pytest.approx(8 * 1.7 + 0.1)
    assert prefill.at_whole_depth(result, "stock")[0] == pytest.approx(8 * 9.9 + 0.1)
    assert prefill.at_whole_depth(result, "full")[0] == pytest.approx(8 * 9.9 + 0.1)


def test_the_whole_is_what_it_is() -> None:
    result = {**prefill_result(), "fraction": 1}
    for name in ("stock", "full", "320", "limit 320"):
        assert prefill.at_whole_depth(result, name) == pytest.approx(result["samples"][name])


def test_equal_bytes_of_kv_cache_are_shown_as_such() -> None:
    assert "| 320 | 5.000 | 5.00 | 1.00 s, 2.00 s | 40 (40 MiB) | 20% of 203 | 0 |" in report("throughput").tables()


def test_a_missed_mark_is_never_hidden() -> None:
    slow = report()
    slow.results["prefill"].update(prefill_result(over_limit=1.5))  # type: ignore[attr-defined]
    for text in (slow.text(), slow.entry()):
        assert "MISSED  TTFT ours / limit at 320: 1.5 (at most 1.08)" in text
    assert {mark["name"] for mark in json.loads(slow.json_line())["marks"] if not mark["met"]} >= {
        "TTFT ours / limit at 320"
    }


def test_what_was_not_measured_is_named() -> None:
    assert report("flops", "prefill").missing == ["throughput", "decode", "curve", "serve"]
    assert "not measured: throughput,decode,curve,serve" in report("flops", "prefill").text().replace(", ", ",")
    assert "Not measured: serve." in report(*list(PARTS)[:-1]).entry()
    assert "ot measured" not in report().text() + report().entry()


def test_an_entry_has_date_command_commit_and_machine_and_stands_first() -> None:
    before = LOG.read_text()
    entry = report().entry("../docs/images/bench.png")
    after = add_entry(before, entry)
    assert "## 2026-01-02: " in entry
    for part in ("`make bench`", "commit abc1234", "2 cores of a CPU", "A slice, bfloat16", "../docs/images/bench.png"):
        assert part in entry
    head, _, rest = before.partition("\n## ")
    assert after == f"{head}\n{entry}\n## {rest}"
    assert after.index("2026-01-02") == after.index("\n## ") + 4


def test_a_log_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="no section"):
        add_entry("# Measurements\n", "## new\n")


def test_the_json_has_everything() -> None:
    line = report().json_line()
    assert "\n" not in line
    data = json.loads(line)
    assert set(data["results"]) == set(PARTS)
    assert len(data["marks"]) == len(report().marks)


@pytest.mark.parametrize("parts", [("prefill",), ("curve",), ("prefill", "curve")])
def test_the_plot_shows_what_was_measured(parts: tuple[str, ...], tmp_path: Path) -> None:
    draw_plot(report(*parts), tmp_path / "images" / "bench.png")
    assert (tmp_path / "images" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_of_nothing(tmp_path: Path) -> None:
    draw_plot(report("flops"), tmp_path / "bench.png")
    assert not (tmp_path / "bench.png").exists()


def test_parts_run_in_one_order_whatever_the_order_they_are_named_in() -> None:
    assert plan_parts("curve,prefill", saved=["prefill"]) == ["prefill", "curve"]
    assert plan_parts(None, saved=[]) == list(PARTS)


def test_a_run_that_was_stopped_goes_on_with_what_is_not_saved() -> None:
    assert plan_parts(None, saved=["flops", "prefill"]) == ["throughput", "decode", "curve", "serve"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="no part 'speed'; the parts are flops, prefill"):
        plan_parts("prefill,speed", saved=[])
