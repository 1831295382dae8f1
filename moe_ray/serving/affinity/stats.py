"""What became of the requests that came to a replica."""

from dataclasses import dataclass


@dataclass
class AffinityStats:
    """Counted from the start of the replica.

    Attributes:
        affinity_kept: answered here after the directory was asked.
        affinity_handed: handed to another replica, which began to answer.
        affinity_unreached: of those kept, handed to a replica that did not begin to answer.
        affinity_broken: of those handed, lost with the other replica in the middle of their answers.
        affinity_unasked: kept without asking, as the directory did not answer.
    """

    affinity_kept: int = 0
    affinity_handed: int = 0
    affinity_unreached: int = 0
    affinity_broken: int = 0
    affinity_unasked: int = 0
