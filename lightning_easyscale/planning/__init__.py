"""How many ESTs each device holds, and which devices a job should ask for. Imports no torch."""

from lightning_easyscale.planning.allocation import Allocation, plan, waste_and_speedup, worth_moving
from lightning_easyscale.planning.by_type import TypePlanner, useful_counts
from lightning_easyscale.planning.communication import Communication, Link, LinkFit, fit_link
from lightning_easyscale.planning.heuristic import best_by_placement, heuristic_proposals
from lightning_easyscale.planning.interjob import Option, choose_exactly, choose_greedily
from lightning_easyscale.planning.profile import Configuration, Exchange, Measurement, Profile
from lightning_easyscale.planning.proposals import Proposal, propose
from lightning_easyscale.planning.published import published_link, published_profile
from lightning_easyscale.planning.step_time import AffineStepTime, StepTime, TabulatedStepTime, ests_that_fit

__all__ = [
    "AffineStepTime",
    "Allocation",
    "Communication",
    "Configuration",
    "Exchange",
    "Link",
    "LinkFit",
    "Measurement",
    "Option",
    "Profile",
    "Proposal",
    "StepTime",
    "TabulatedStepTime",
    "TypePlanner",
    "best_by_placement",
    "choose_exactly",
    "choose_greedily",
    "ests_that_fit",
    "fit_link",
    "heuristic_proposals",
    "plan",
    "propose",
    "published_link",
    "published_profile",
    "useful_counts",
    "waste_and_speedup",
    "worth_moving",
]
