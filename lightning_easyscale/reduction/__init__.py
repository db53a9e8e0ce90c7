"""Gradient reduction in an order that does not depend on placement."""

from .bucket import BucketForm, LocalGradients
from .bucket_gradients import BucketGradients
from .collector import ESTDataParallel
from .exchange import NativeReduction, Reduction, RingReduction, TreeReduction
from .gradients import GradientReduce
from .hook import ordered_allreduce_hook
from .lane import Pending
from .layout import BucketLayout, initial_layout, rebuilt_layout
from .orders import ring_chunks, ring_fold, tree_fold
from .tree import Block, TreeFold, combine
from .tree_gradients import TreeGradients

__all__ = [
    "Block",
    "BucketForm",
    "BucketGradients",
    "BucketLayout",
    "ESTDataParallel",
    "GradientReduce",
    "LocalGradients",
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
    "ring_chunks",
    "ring_fold",
    "tree_fold",
]
