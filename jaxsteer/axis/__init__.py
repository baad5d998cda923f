"""The assistant axis (arXiv 2601.10387): where characters lie, where the Assistant does, and how to hold it."""

from jaxsteer.axis.pipeline import AxisOptions, AxisRun, load_run, run
from jaxsteer.axis.projection import load_axis, project
from jaxsteer.axis.result import AxisResult, compare
from jaxsteer.axis.role_files import load_roles
from jaxsteer.axis.roles import Role, RoleSet, TraitPair
from jaxsteer.axis.rollouts import WritingOptions
from jaxsteer.axis.transcripts import Transcript

__all__ = [
    "AxisOptions",
    "AxisResult",
    "AxisRun",
    "Role",
    "RoleSet",
    "TraitPair",
    "Transcript",
    "WritingOptions",
    "compare",
    "load_run",
    "load_axis",
    "load_roles",
    "project",
    "run",
]
