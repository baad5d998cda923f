"""Plans: what a search, an SAE, decoding or a conversion takes on machines that need not be there."""

from jaxsteer.planning.chips import Chip, Topology, topology
from jaxsteer.planning.plan import Plan, efficiency, make_plan, scaling
from jaxsteer.planning.programs import Workload

__all__ = ["Chip", "Plan", "Topology", "Workload", "efficiency", "make_plan", "scaling", "topology"]
