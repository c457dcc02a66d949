"""What tasks that classify share: the metrics of an evaluation, and a report of how the classifier errs."""

from bigmodel.classification.metrics import AUROC, ClassMetrics
from bigmodel.classification.report import Report

__all__ = ["AUROC", "ClassMetrics", "Report"]
