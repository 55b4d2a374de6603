"""The resources a reward can spend or save."""

from typing import Literal, TypeAlias, get_args

from ..errors import UserError
from .outcome import Outcome

Resource: TypeAlias = Literal["macs", "params", "seconds", "filters"]


def check_resource(resource: str) -> None:
    """Refuse a resource nobody measures.

    Raises:
        UserError: naming the ones that exist.
    """
    if resource not in get_args(Resource):
        raise UserError(f"resource is {resource!r}, but it must be one of {', '.join(get_args(Resource))}")


def removed_fraction(outcome: Outcome, resource: Resource) -> float:
    """The fraction of a resource that pruning removed.

    Returns:
        1 - pruned / base, at most 1; below 0 only where the latency grew.

    Raises:
        UserError: `seconds` asked of an outcome without a measured latency.
    """
    left = {
        "macs": lambda: outcome.macs_fraction,
        "params": lambda: outcome.params_fraction,
        "seconds": lambda: outcome.seconds_fraction,
        "filters": lambda: outcome.kept_fraction,
    }
    return 1.0 - left[resource]()
