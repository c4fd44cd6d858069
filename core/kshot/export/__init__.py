"""Exports a learner as a bundle of ONNX graphs, and compares these with torch."""

from kshot.export.exporting import ExportError, Facts, Report, export

__all__ = ["ExportError", "Facts", "Report", "export"]
