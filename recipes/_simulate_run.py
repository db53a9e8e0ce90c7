"""From a plain configuration to simulations: no Hydra objects pass beyond this point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from lightning_easyscale.planning import Communication, Link, Profile, published_link, published_profile
from lightning_easyscale.planning.published import PARAMETERS
from lightning_easyscale.simulation.cluster import ClusterSpec
from lightning_easyscale.simulation.compat import POLICIES as PUBLISHED
from lightning_easyscale.simulation.compat import PUBLISHED_RESCALE_S, simulate_published
from lightning_easyscale.simulation.disturbances import Failures, Serving
from lightning_easyscale.simulation.engine import Engine
from lightning_easyscale.simulation.job import build_jobs
from lightning_easyscale.simulation.policies import POLICIES, make_policy
from lightning_easyscale.simulation.policy import Costs
from lightning_easyscale.simulation.result import Result
from lightning_easyscale.simulation.traces import Trace, assign, generate, read_easyscale, read_public

Config = Mapping[str, Any]
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def policy_names(config: Config) -> list[str]:
    """The policies to run.

    Raises:
        ValueError: if one is unknown, or has no published form under ``compat``.
    """
    names = list(config["policy"]["names"])
    known = list(PUBLISHED) if config["compat"] else list(POLICIES)
    if "all" in names:
        return known
    for name in names:
        if name not in known:
            where = "has no published form (`compat=true`)" if name in POLICIES else "is unknown"
            raise ValueError(f"`policy={name}` {where}. HINT: one of {', '.join(known)}, or `all`.")
    return names


def load_profile(config: Config) -> Profile:
    """The profile that the configuration names."""
    options = config["profile"]
    if options["path"]:
        profile = Profile.load(options["path"])
    else:
        profile = published_profile(
            batch_rule=options["batch_rule"], d2_everywhere=bool(options["d2_everywhere"] or config["compat"])
        )
    return replace(profile, switch_seconds=options["switch_seconds"]) if options["switch_seconds"] else profile


def load_trace(config: Config, profile: Profile, cluster: ClusterSpec, seed: int) -> Trace:
    """The trace that the configuration names; public traces get models and types drawn with `seed`."""
    options = config["trace"]
    form = options["format"]
    if form == "generated":
        return generate(
            profile,
            cluster.devices,
            shape=options["shape"],
            num_jobs=options["num_jobs"],
            load=options["load"],
            seed=seed,
        )
    if form == "easyscale":
        duplicates = "last" if config["compat"] and options["duplicates"] == "error" else options["duplicates"]
        lenient = bool(options["lenient"] or config["compat"])
        return read_easyscale(options["path"], profile, duplicates=duplicates, lenient=lenient)
    raw, notes = read_public(
        options["path"],
        format=form,
        lenient=options["lenient"],
        limit=options["limit"],
        max_gpus=options["max_gpus"],
    )
    jobs, more = assign(raw, profile, cluster.devices, seed=seed)
    return Trace(form, jobs, notes + more)


def exchange(config: Config, profile: Profile) -> Callable[[str], Communication | None] | None:
    """Gradient exchange per workload, or None where it is switched off: the profile's own, else the published one."""
    options = config["communication"]
    if not options["enabled"]:
        return None
    fitted = profile.link or published_link().link
    sizes = profile.gradient_bytes or {name: 4.0 * count for name, count in PARAMETERS.items()}

    def link(prefix: str, default: Link) -> Link:
        latency, rate = options[f"{prefix}latency_s"], options[f"{prefix}bytes_per_s"]
        return Link(default.latency_s if latency is None else latency, default.bytes_per_s if rate is None else rate)

    local = link("", fitted)
    remote = link("remote_", local)
    models = {name: Communication(size, local, remote) for name, size in sizes.items()}
    return models.get


def simulate(
    config: Config,
    name: str,
    trace: Trace,
    profile: Profile,
    cluster: ClusterSpec,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """One policy on one trace."""
    costs = {key: value for key, value in config["costs"].items() if value is not None}
    if config["compat"]:
        result = simulate_published(
            trace.jobs,
            cluster.types,
            cluster.capacity,
            profile,
            policy=name,
            interval_s=60.0 if config["interval"] is None else config["interval"],
            rescale_s=costs.get("rescale_s", PUBLISHED_RESCALE_S),
            on_progress=on_progress,
        )
    else:
        jobs = build_jobs(trace.jobs, cluster.types, profile, capacity=cluster.capacity, oversize=config["oversize"])
        moved = [j.spec.name for j in jobs if cluster.types[j.home] != j.spec.preferred]
        result = Engine(
            cluster,
            jobs,
            make_policy(name),
            costs=Costs(**costs),
            interval_s=config["interval"] or 0.0,
            failures=Failures(**config["failures"], seed=config["seed"]),
            serving=Serving(**config["serving"], seed=config["seed"]),
            communication=exchange(config, profile),
            on_progress=on_progress,
        ).run()
        if moved:
            result.notes.append(f"larger than their type, moved to the fastest that is large enough: {moved}")
    result.notes[:0] = [*trace.notes, f"step times: {profile.source}"]
    return result


def summarise(runs: Sequence[Result]) -> dict[str, Any]:
    """One summary of a policy's runs: the run's own, or means with 95 % confidence half-widths over seeds."""
    summaries = [run.summary() for run in runs]
    if len(summaries) == 1:
        return summaries[0]
    merged: dict[str, Any] = {"policy": runs[0].policy, "runs": len(runs)}
    t = _T95[len(runs) - 2] if len(runs) - 2 < len(_T95) else 1.96
    for key, value in summaries[0].items():
        if not isinstance(value, str):
            values = [float(s[key]) for s in summaries]
            merged[key] = mean(values)
            merged[f"{key}_ci95"] = t * stdev(values) / math.sqrt(len(values))
    return merged


def compare(jcts: Mapping[str, Sequence[float]], against: str = "easyscale-best") -> dict[str, tuple[float, float]]:
    """Average JCT of each policy over that of `against` on the same traces: mean ratio, 95 % confidence half-width.

    Seeds differ far more from each other than policies do, so policies are compared trace by trace.
    """
    if against not in jcts or len(jcts[against]) < 2:
        return {}
    compared = {}
    for name, values in jcts.items():
        ratios = [a / b for a, b in zip(values, jcts[against], strict=True)]
        t = _T95[len(ratios) - 2] if len(ratios) - 2 < len(_T95) else 1.96
        compared[name] = (mean(ratios), t * stdev(ratios) / math.sqrt(len(ratios)))
    return compared
