"""What is there: logit and tuned lens, logit attribution, probes, attention statistics, features."""

from jaxsteer.lens.logit_lens import read, site_logits
from jaxsteer.lens.result import LensReading
from jaxsteer.lens.tuned_lens import TunedLens
from jaxsteer.lens.words import Words, read_words

__all__ = ["LensReading", "TunedLens", "Words", "read", "read_words", "site_logits"]
