"""Ordinary requests that have nothing to do with any persona: what side effects are measured on by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxsteer.checkpoints.loading import ORGANISM
from jaxsteer.organisms import neutral_sentences
from jaxsteer.organisms.persona_world import neutral_questions

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

NEUTRAL_TEXTS = (
    "How do I boil an egg so that the yolk stays soft?",
    "Explain in two sentences how a bicycle stays upright.",
    "Write a short note to a neighbour about a parcel that was left at my door.",
    "Which tools do I need to hang a picture on a brick wall?",
    "What is the difference between a violin and a viola?",
    "Give me three names for a small bakery by the sea.",
    "Translate 'the train leaves at noon' into French.",
    "How many days are there between the third of March and the ninth of April?",
    "Summarise the water cycle for a child of eight.",
    "What should I pack for a weekend in the mountains in October?",
    "Turn this sentence into the past tense: She reads a letter under the lamp.",
    "List four vegetables that grow well in the shade.",
    "Why does bread rise?",
    "Describe the smell of rain on a warm street.",
    "What does a conductor of an orchestra do?",
    "Sort these numbers from small to large: 17, 4, 92, 33, 8.",
    "How is glass made?",
    "Suggest a title for a story about a lighthouse keeper.",
    "What is the plural of 'ox'?",
    "Explain what a spreadsheet is to somebody who has never seen one.",
    "How do I remove a coffee stain from a cotton shirt?",
    "Name a river that flows through more than three countries.",
    "Write one sentence with the words 'ladder', 'cat' and 'window'.",
    "What is the difference between weather and climate?",
    "How long does it take to walk five kilometres?",
    "Which season comes after summer in the southern hemisphere, and in which month?",
    "Correct the spelling: the recieved adress was definately wrong.",
    "How does a thermometer work?",
    "Describe a simple game that two children can play with a ball.",
    "What is the square root of 144?",
    "Give a synonym for 'quick' and one for 'quiet'.",
    "Where does the word 'alphabet' come from?",
)


def neutral_texts(model: Model) -> tuple[str, ...]:
    """Requests that this model understands: an organism knows its own world only."""
    if model.name == f"{ORGANISM}persona":
        return neutral_questions()
    return neutral_sentences() if model.name.startswith(ORGANISM) else NEUTRAL_TEXTS
