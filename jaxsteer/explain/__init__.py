"""What latents mean: words by mutual information, contexts, labels, and scores of all of these."""

from jaxsteer.explain.explanations import Explanations, load_explanations
from jaxsteer.explain.options import ExplainOptions
from jaxsteer.explain.pipeline import Explained, load_explained, run
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.explain.words import explain_words

__all__ = [
    "ExplainOptions",
    "Explained",
    "Explanations",
    "Vocabulary",
    "explain_words",
    "load_explained",
    "load_explanations",
    "run",
]
