"""What a score is: the table of metrics, and the metrics of several tasks side by side.

A new metric is a new row of `table.METRICS`; everything that shows, compares or constrains a score asks its row.
"""

from dfmerge_studies.tasks.metrics.row import AGREEMENT, MEAN, SAME, HarnessScore, Judged, Metric, TaskScore
from dfmerge_studies.tasks.metrics.several import Guarded, Metrics, guarded, largest_drop
from dfmerge_studies.tasks.metrics.table import (
    METRICS,
    agrees,
    harness_metric,
    is_own,
    own_metric,
    row_by_row,
    task_metrics,
)

__all__ = [
    "AGREEMENT",
    "MEAN",
    "METRICS",
    "SAME",
    "Guarded",
    "HarnessScore",
    "Judged",
    "Metric",
    "Metrics",
    "TaskScore",
    "agrees",
    "guarded",
    "harness_metric",
    "is_own",
    "largest_drop",
    "own_metric",
    "row_by_row",
    "task_metrics",
]
