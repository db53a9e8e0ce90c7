"""The seed of a job: the user's, or one that is drawn, announced and recorded.

Lightning keeps the seed of `seed_everything` in ``PL_GLOBAL_SEED``, seeds every rank with it when a run starts, and
shuffles by it. Without one, nothing could be reproduced. So where the user has set none, executor 0 draws one when the
executors first meet and all of them put it there: the run is then the one that ``PL_GLOBAL_SEED=<seed>`` gives with the
same script, under this strategy or under stock DDP.

A drawn seed gives way to the seed of a checkpoint that is resumed; a seed that the user has set does not.
"""

from __future__ import annotations

import os
import random

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .checkpoint import CheckpointError
from .runtime.peers import Peers

SEED_VARIABLE = "PL_GLOBAL_SEED"
DRAWN_VARIABLE = "EASYSCALE_DRAWN_SEED"
"""Equals the seed where it was drawn; a seed that the user sets later differs from it."""


def current_seed() -> int | None:
    """The seed in force, if any."""
    value = os.environ.get(SEED_VARIABLE)
    return None if value is None else int(value)


def agree_on_seed(peers: Peers) -> int:
    """Make sure that there is one seed for all executors; a collective of the executors.

    Raises:
        RuntimeError: if the executors were seeded differently.
    """
    mine = current_seed()
    if mine is None and peers.index == 0:
        mine = random.SystemRandom().randrange(2**32)
        _adopt(mine)
        rank_zero_info(
            f"No seed is set; drew {mine}. `PL_GLOBAL_SEED={mine}` in the environment, or `seed_everything({mine})`"
            " just before the run, reproduces it."
        )
    seeds = peers.all_gather_object(mine)
    if any(seed not in (None, seeds[0]) for seed in seeds):
        raise RuntimeError(
            f"the executors were seeded with {seeds}, and a run has one seed whatever its placement."
            " HINT: call `seed_everything` with the same seed everywhere; every EST has generators of its own anyway."
        )
    if mine is None:
        _adopt(seeds[0])
    return seeds[0]


def resume_seed(saved: int | None) -> None:
    """Take the seed of a checkpoint.

    Raises:
        CheckpointError: if the user has set another one.
    """
    now = current_seed()
    if saved is None or saved == now:
        return
    if now is not None and os.environ.get(DRAWN_VARIABLE) != str(now):
        raise CheckpointError(
            f"the checkpoint was trained with seed {saved}, this run has {now}: samplers would draw other samples."
            f" HINT: `seed_everything({saved})`, or start a new job from the weights only."
        )
    _adopt(saved)


def _adopt(seed: int) -> None:
    os.environ[SEED_VARIABLE] = os.environ[DRAWN_VARIABLE] = str(seed)
