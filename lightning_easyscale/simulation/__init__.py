"""Event-driven simulation of a cluster under scheduling policies. Imports neither torch nor Lightning."""

from lightning_easyscale.simulation.cluster import ClusterSpec
from lightning_easyscale.simulation.compat import simulate_published
from lightning_easyscale.simulation.disturbances import Failures, Serving
from lightning_easyscale.simulation.engine import Engine
from lightning_easyscale.simulation.job import JobSpec, JobState, build_jobs
from lightning_easyscale.simulation.policies import POLICIES, make_policy
from lightning_easyscale.simulation.policy import Costs, ElasticPolicy, GangPolicy, Policy, View
from lightning_easyscale.simulation.result import JobRecord, Result
from lightning_easyscale.simulation.traces import Trace, generate, read_easyscale, read_public

__all__ = [
    "POLICIES",
    "ClusterSpec",
    "Costs",
    "ElasticPolicy",
    "Engine",
    "Failures",
    "GangPolicy",
    "JobRecord",
    "JobSpec",
    "JobState",
    "Policy",
    "Result",
    "Serving",
    "Trace",
    "View",
    "build_jobs",
    "generate",
    "make_policy",
    "read_easyscale",
    "read_public",
    "simulate_published",
]
