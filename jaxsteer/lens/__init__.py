"""What is there: logit and tuned lens, logit attribution, probes, attention statistics, features."""

from jaxsteer.lens.comparison import LensComparison
from jaxsteer.lens.differences import Side, compare
from jaxsteer.lens.logit_lens import read, site_logits
from jaxsteer.lens.result import LensReading
from jaxsteer.lens.tuned_lens import TunedLens
from jaxsteer.lens.tuned_lens_files import load_lens, save_lens
from jaxsteer.lens.tuning import Tuning, tune
from jaxsteer.lens.words import Words, read_words

__all__ = [
    "LensComparison",
    "LensReading",
    "Side",
    "TunedLens",
    "Tuning",
    "Words",
    "compare",
    "load_lens",
    "read",
    "read_words",
    "save_lens",
    "site_logits",
    "tune",
]
