"""The dashboard that shows what pruning saves."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.frame import frame, label, with_row
from deploy.grafana.panels import NO_LIMIT, Limits, Query, number, series
from deploy.grafana.queries import BUDGET_CLASS, increase, quantile, rate, ratio

_FULL, _KEPT, _SAVED = (f"visiondrop_visual_tokens_{kind}_total" for kind in ("full", "kept", "saved"))
_IMAGES = "visiondrop_images_total"
_FIRST_TOKEN = "visiondrop_time_to_first_token_seconds"
_SECONDS = "visiondrop_request_seconds"

_SAVING = Limits(0.5, 0.1, falling=True)
_FIRST_TOKEN_LIMITS = Limits(1, 2.5)
"""2.5 s is also the objective of the alerts (deploy/prometheus/rules)."""
_SECONDS_LIMITS = Limits(30, 120)


def visual_tokens() -> Dashboard:
    board = frame(
        "visiondrop-visual-tokens",
        "VisionDrop / Visual tokens",
        "What visual token budgets save, and what clients gain by it.",
        _IMAGES,
    ).with_variable(
        label(
            "budget_class",
            "Budget class",
            'label_values(visiondrop_images_total{job=~"$job", instance=~"$instance"}, budget_class)',
        )
    )
    board = with_row(
        board,
        "Savings",
        [
            number(
                "Saved share",
                "Visual tokens that the decoder did not process, of those that the stock model would have processed.",
                "percentunit",
                ratio(rate(_SAVED, BUDGET_CLASS), rate(_FULL, BUDGET_CLASS)),
                limits=_SAVING,
            ),
            number(
                "Saved in this range",
                "Visual tokens saved in the dashboard's time range.",
                "short",
                increase(_SAVED, BUDGET_CLASS),
                limits=NO_LIMIT,
            ),
            number(
                "Prefill FLOP/s saved",
                "Floating-point operations a second that the decoder's layers did not have to do, compared with the "
                "stock model on the same prompts. All budget classes.",
                "flops",
                rate("visiondrop_prefill_flops_saved_total"),
                limits=NO_LIMIT,
            ),
            number(
                "Images",
                "Images a second that an engine accepted.",
                "cps",
                rate(_IMAGES, BUDGET_CLASS),
                limits=NO_LIMIT,
            ),
            number(
                "Images in this range",
                "Images accepted in the dashboard's time range.",
                "short",
                increase(_IMAGES, BUDGET_CLASS),
                limits=NO_LIMIT,
            ),
            number(
                "Schedule mismatches",
                "Prompts in this range that held another number of visual tokens than planned. Must be 0: see the "
                "runbook of VisionDropScheduleMismatch.",
                "short",
                increase("visiondrop_schedule_mismatch_total"),
                limits=Limits(1, 1),
            ),
        ],
    )
    board = with_row(
        board,
        "Tokens",
        [
            series(
                "Visual tokens: full and kept",
                "Full: what the stock model would have used. Kept: what a decoder layer held on average. The gap is "
                "saved.",
                "cps",
                Query(rate(_FULL, BUDGET_CLASS), "full"),
                Query(rate(_KEPT, BUDGET_CLASS), "kept"),
                limits=NO_LIMIT,
            ),
            series(
                "Saved share by budget class",
                "Of each class's full visual tokens. Small images save less, because their full count is nearer to "
                "the budget; the class full saves nothing.",
                "percentunit",
                Query(
                    ratio(rate(_SAVED, BUDGET_CLASS, by="budget_class"), rate(_FULL, BUDGET_CLASS, by="budget_class")),
                    "{{budget_class}}",
                ),
                limits=_SAVING,
                maximum=1,
            ),
            series(
                "Visual tokens kept for an image",
                "Mean by budget class: at most 160 (low), 320 (medium), 640 (high).",
                "short",
                Query(
                    ratio(rate(_KEPT, BUDGET_CLASS, by="budget_class"), rate(_IMAGES, BUDGET_CLASS, by="budget_class")),
                    "{{budget_class}}",
                ),
                limits=Limits(640, 2880),
            ),
            series(
                "Images by budget class",
                "Images a second that an engine accepted.",
                "cps",
                Query(rate(_IMAGES, BUDGET_CLASS, by="budget_class"), "{{budget_class}}"),
                limits=NO_LIMIT,
                stacked=True,
            ),
            series(
                "Prefill FLOP/s saved",
                "Floating-point operations a second saved in the decoder's layers. All budget classes.",
                "flops",
                Query(rate("visiondrop_prefill_flops_saved_total"), "saved"),
                limits=NO_LIMIT,
            ),
            series(
                "Schedule mismatches",
                "Prompts a second that held another number of visual tokens than planned. Must be 0.",
                "cps",
                Query(rate("visiondrop_schedule_mismatch_total"), "mismatches"),
                limits=Limits(1e-6, 1e-6),
            ),
        ],
    )
    return with_row(
        board,
        "Latency by budget class (none: requests without images)",
        [
            series(
                "Time to first token, median",
                "Of streams, from arrival. Compare the classes: what a smaller budget gains.",
                "s",
                Query(quantile(0.5, _FIRST_TOKEN, _OR_NONE, by="budget_class"), "{{budget_class}}"),
                limits=_FIRST_TOKEN_LIMITS,
            ),
            series(
                "Time to first token, 95th percentile",
                "Of streams, from arrival. The objective of the alerts is 2.5 s for 95 % of the streams.",
                "s",
                Query(quantile(0.95, _FIRST_TOKEN, _OR_NONE, by="budget_class"), "{{budget_class}}"),
                limits=_FIRST_TOKEN_LIMITS,
            ),
            series(
                "Whole request, 95th percentile",
                "From arrival to the answer's last byte.",
                "s",
                Query(quantile(0.95, _SECONDS, _OR_NONE, by="budget_class"), "{{budget_class}}"),
                limits=_SECONDS_LIMITS,
            ),
        ],
    )


_OR_NONE = 'budget_class=~"none|$budget_class"'
"""The chosen classes, and requests without images to compare with. With All chosen it is `none|.+`."""
