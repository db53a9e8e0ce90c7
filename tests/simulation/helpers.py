from lightning_easyscale.planning import Profile, published_profile
from lightning_easyscale.planning.profile import Measurement
from lightning_easyscale.simulation.cluster import ClusterSpec
from lightning_easyscale.simulation.engine import Engine
from lightning_easyscale.simulation.job import JobSpec, build_jobs
from lightning_easyscale.simulation.policies import make_policy
from lightning_easyscale.simulation.policy import Costs

PAPER = ClusterSpec({"v100": 32, "p100": 16, "t4": 16})
FREE = Costs(0.0, 0.0, 0.0)
PUBLISHED = Costs(20.0, 20.0, 20.0)


def simple_profile(**seconds):
    """One workload `w`, the given seconds per type for every kind of kernel."""
    rows = tuple(Measurement("w", t, k, 1, s) for t, s in seconds.items() for k in ("stock", "D1", "D2"))
    return Profile("simple", "made up", rows)


def job(name, submit=0.0, size=1, steps=100.0, d2=False, preferred="v100", queue="default"):
    return JobSpec(name, submit, "w", size, steps, 1, d2, preferred, queue)


def run(specs, policy, *, cluster=PAPER, profile=None, costs=None, watch=None, oversize="error", **options):
    jobs = build_jobs(
        specs, cluster.types, profile or published_profile(), capacity=cluster.capacity, oversize=oversize
    )
    engine = Engine(cluster, jobs, make_policy(policy), costs=costs, **options)
    if watch:
        watch(engine)
    return engine.run()
