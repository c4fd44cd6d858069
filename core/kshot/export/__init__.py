"""From a learner to a bundle: traced to ONNX, written, and compared with torch before it is called one."""

from kshot.export.exporting import ExportError, Facts, Report, export

__all__ = ["ExportError", "Facts", "Report", "export"]
