"""Networks from ONNX files and back."""

from tightrope.graph.onnx.read import OnnxNetwork, read_onnx
from tightrope.graph.onnx.write import write_onnx

__all__ = ["OnnxNetwork", "read_onnx", "write_onnx"]
