"""The user's network as operators that share its live parameters."""

from tightrope.graph.graph import Graph, Node
from tightrope.graph.trace import check_training_mode, recast, trace

__all__ = ["Graph", "Node", "check_training_mode", "recast", "trace"]
