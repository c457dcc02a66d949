"""Evaluation of classification tasks: metrics, and a report of the errors."""

from bigmodel.evaluation.class_metrics import AUROC, ClassMetrics
from bigmodel.evaluation.report import Report

__all__ = ["AUROC", "ClassMetrics", "Report"]
