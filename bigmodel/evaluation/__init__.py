"""What tasks that classify share: the metrics of an evaluation, and a report of how the classifier errs."""

from bigmodel.evaluation.class_metrics import AUROC, ClassMetrics
from bigmodel.evaluation.report import Report

__all__ = ["AUROC", "ClassMetrics", "Report"]
