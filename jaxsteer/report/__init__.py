"""What runs found, for people: pages of HTML and tables for the terminal, made from the files of the runs alone."""

from jaxsteer.report.axis_files import AxisFiles, is_axis, read_axis
from jaxsteer.report.circuits_page import is_circuits
from jaxsteer.report.explain_page import is_explained
from jaxsteer.report.lens_page import is_lens
from jaxsteer.report.page import write_plots, write_report
from jaxsteer.report.run_files import RunFiles, read_run
from jaxsteer.report.study import StudyFiles, is_study, read_study, run_folders

__all__ = [
    "AxisFiles",
    "RunFiles",
    "StudyFiles",
    "is_axis",
    "is_circuits",
    "is_explained",
    "is_lens",
    "is_study",
    "read_axis",
    "read_run",
    "read_study",
    "run_folders",
    "write_plots",
    "write_report",
]
