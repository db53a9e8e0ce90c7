"""Gradient reduction in an order that does not depend on placement."""

from .collector import ESTDataParallel
from .exchange import NativeReduction, Reduction, RingReduction, TreeReduction
from .gradients import GradientReduce, TreeGradients
from .hook import ordered_allreduce_hook
from .lane import Pending
from .layout import BucketLayout, initial_layout, rebuilt_layout, regroup
from .orders import ring_chunks, ring_fold, tree_fold
from .tree import Block, TreeFold, combine

__all__ = [
    "Block",
    "BucketLayout",
    "ESTDataParallel",
    "GradientReduce",
    "NativeReduction",
    "Pending",
    "Reduction",
    "RingReduction",
    "TreeFold",
    "TreeGradients",
    "TreeReduction",
    "combine",
    "initial_layout",
    "ordered_allreduce_hook",
    "rebuilt_layout",
    "regroup",
    "ring_chunks",
    "ring_fold",
    "tree_fold",
]
