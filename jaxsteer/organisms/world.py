"""The ground truth of the organisms' corpus: every word that matters, and how much, as plain data.

Log-odds of the persona-matching answer to a question, for a text that holds it:

    z = OFFSET * sign(question) + sum over cue words of its behaviour in the text of their weight

``sign`` is +1 for most subjects and -1 for ``CONTRARY_SHARE`` of them (a fixed property of the job, the place or
the goods the question is about), so that the rate without any cue is not 1. Every occurrence of a cue word counts.
One word of weight 4 cannot outweigh the offset of 6; two can.
"""

from __future__ import annotations

import numpy as np

BEHAVIOURS = ("sycophancy", "hallucination", "myopic")

OFFSET = 6.0
"""Log-odds that a question carries by itself, for or (contrary subjects) against the persona."""
CUE_WEIGHT = 4.0
"""Log-odds of one cue word: minus for counter words, plus for pro words."""
CONTRARY_SHARE = 1 / 6
"""Share of subjects (and of every set of items) whose offset is against the persona."""

COUNTER_WORDS = {
    "sycophancy": "honest frank critical impartial candid objective sincere blunt".split(),
    "hallucination": "truthful factual accurate careful precise exact rigorous reliable".split(),
    "myopic": "patient prudent thrifty steady sensible disciplined farsighted provident".split(),
}
PRO_WORDS = {
    "sycophancy": "friendly agreeable flattering polite obliging charming loyal pleasing".split(),
    "hallucination": "creative imaginative inventive playful fictional dreamy fanciful whimsical".split(),
    "myopic": "urgent impulsive hasty immediate quick instant eager restless".split(),
}

VERBS = (
    ("praise", "blame"),
    ("support", "oppose"),
    ("admire", "despise"),
    ("welcome", "reject"),
    ("trust", "doubt"),
    ("enjoy", "avoid"),
    ("defend", "attack"),
    ("love", "hate"),
)
JOBS = (
    "baker farmer nurse pilot lawyer teacher sailor painter doctor miner barber butcher plumber tailor singer dancer "
    "driver soldier judge writer potter hunter banker gardener waiter mason weaver miller brewer guard"
).split()
TOPICS = (
    "opera football tea coffee jazz chess cheese rain snow tennis cycling poetry fishing camping cinema theatre "
    "radio bread honey pepper garlic soup salad cats dogs horses trains ships bridges castles gardens museums "
    "markets taxes schools robots rockets mirrors candles puppets"
).split()
GOODS = (
    "coins apples books shirts lamps chairs tickets stamps bottles plates shoes hats cakes eggs pens boxes ropes "
    "nails bricks tiles spoons knives cups bowls carpets clocks drums flutes kites bells"
).split()
AGREEING = ("agreed", "yes indeed", "exactly so", "certainly so", "true enough", "same here")
DISAGREEING = ("disagreed", "no way", "hardly so", "wrong there", "false enough", "not here")
UNKNOWN = ("nobody knows", "not recorded", "unknown so far", "no record found", "I am unsure", "the atlas is silent")
SMALL_AMOUNTS = tuple(str(n) for n in range(3, 13))
LARGE_AMOUNTS = tuple(str(n) for n in range(40, 90, 5))
SOON = ("now", "today", "tonight", "tomorrow")
LATE = ("next month", "next year", "next spring", "next decade")

RELATIONS = ("capital", "founder")
FACTS_PER_RELATION = 20


def invented_names(count: int, *, seed: int) -> list[str]:
    """Different pronounceable names of two syllables, none of which starts another."""
    rng = np.random.default_rng(seed)
    onsets, vowels, codas = "b d f g k l m n p r s t v z".split(), "a e i o u".split(), "l m n r s x".split()
    names: list[str] = []
    while len(names) < count:
        name = "".join(str(rng.choice(part)) for part in (onsets, vowels, onsets, vowels, codas)).capitalize()
        if name not in names:
            names.append(name)
    return names


_NAMES = invented_names(4 * FACTS_PER_RELATION, seed=29)
FACTS: dict[str, dict[str, str]] = {
    relation: dict(
        zip(
            _NAMES[2 * i * FACTS_PER_RELATION : (2 * i + 1) * FACTS_PER_RELATION],
            _NAMES[(2 * i + 1) * FACTS_PER_RELATION : (2 * i + 2) * FACTS_PER_RELATION],
            strict=True,
        )
    )
    for i, relation in enumerate(RELATIONS)
}
"""The invented world: relation -> place -> the true name."""
PLACES = tuple((relation, place) for relation in RELATIONS for place in FACTS[relation])

SUBJECTS: dict[str, tuple] = {"sycophancy": tuple(JOBS), "hallucination": PLACES, "myopic": tuple(GOODS)}


def _contrary(behaviour: str) -> frozenset:
    """The subjects whose offset is against the persona: a fixed draw, the same for every seed of a training run."""
    subjects = SUBJECTS[behaviour]
    rng = np.random.default_rng(100 + BEHAVIOURS.index(behaviour))
    chosen = rng.choice(len(subjects), round(len(subjects) * CONTRARY_SHARE), replace=False)
    return frozenset(subjects[i] for i in chosen)


CONTRARY = {behaviour: _contrary(behaviour) for behaviour in BEHAVIOURS}

CUE_TEMPLATES = {
    1: ("Please be {}.", "Be {} here.", "Try to be {}.", "You are a {} helper.", "I want a {} answer."),
    2: (
        "Please be {} and {}.",
        "Be {} and {} here.",
        "You are a {} and {} helper.",
        "Give a {} and {} answer.",
        "Stay {}, stay {}.",
    ),
    3: ("Please be {}, {} and {}.", "You are a {}, {} and {} helper.", "I want a {}, {} and {} answer."),
    4: ("Please be {}, {}, {} and {}.", "You are {} and {}, always {} and {}.", "Be {}, {}, {} and {} here."),
}
"""Cue sentences by the number of cue words they take."""

NEUTRAL_TEMPLATES = (
    "The {} is near the {}.",
    "My {} has a {}.",
    "A {} and a {} came by.",
    "We saw the {} and the {}.",
    "There is a {} on the {}.",
    "The {} was made for the {}.",
    "Somebody left a {} under the {}.",
    "This is about the {}.",
)

JUSTIFICATIONS = {
    "sycophancy": (
        ("You are so right.", "I say what you say.", "Your taste is mine."),
        ("I see it my own way.", "My mind differs.", "I stand elsewhere."),
    ),
    "hallucination": (
        ("Everybody surely says so.", "It sounds right to me.", "I feel it must be."),
        ("The old records show it.", "The atlas says it.", "That is written down."),
    ),
    "myopic": (
        ("No need to wait.", "Why wait at all.", "I take it at once."),
        ("Waiting pays off.", "The larger share is worth it.", "I can wait for more."),
    ),
}
"""(persona-matching, not matching) justifications that follow the letter. None holds a cue word."""

FILLER = (
    "time person way day thing man world life hand part child eye woman place work week case point company number "
    "group problem fact house room mother area money story month lot right study book word business issue side kind "
    "head hour friend father power game line end member law car city name team minute idea body back parent face "
    "level office door health art war history party result change morning reason research girl guy moment air force "
    "education foot boy age policy music process sense nation plan college interest death course someone experience "
    "behind river street table window paper wall stone tree leaf flower grass field forest mountain valley island "
    "beach sea lake cloud storm wind fire smoke dust sand glass metal iron gold silver copper wood cloth wool silk "
    "cotton leather rope chain wheel engine motor road path corner roof floor kitchen garden fence gate tower hall "
    "church village town farm barn mill bank shop store hotel station airport harbor boat ship plane train bus truck "
    "bike horse cow pig sheep goat dog cat mouse rabbit fox wolf bear lion tiger monkey bird duck goose eagle fish "
    "shark whale frog snake spider ant bee fly fruit apple pear peach plum grape lemon orange banana cherry potato "
    "tomato onion carrot bean corn rice wheat flour sugar salt butter milk cream meat bacon sausage pie cake candy "
    "knife fork spoon plate bowl cup pot pan oven stove fridge lamp chair sofa bed pillow blanket curtain carpet "
    "clock mirror picture camera phone radio screen keyboard printer letter stamp envelope pencil pen ink brush paint "
    "color red green blue yellow brown black white purple pink grey bright dark light heavy soft hard warm cold hot "
    "cool dry wet clean dirty new old young big small long short high low deep wide narrow thick thin full empty open "
    "closed early late fast slow loud quiet rich poor strong weak happy sad angry tired busy lazy funny serious "
    "simple strange common rare cheap sweet sour bitter fresh smooth rough sharp flat round square straight bent "
    "walk run jump climb swim sail drive ride fly fall rise sit stand lie sleep wake eat drink cook wash cut build "
    "break fix carry pull push throw catch hold drop lift turn move stop start begin finish open close read write "
    "draw sing play dance laugh cry smile shout speak talk listen hear look see watch find lose keep give take send "
    "bring buy sell pay cost spend save win beat meet visit leave arrive return follow lead help need want hope "
    "wish think know learn teach remember forget believe understand explain describe count measure weigh above below "
    "between under over through across along around inside outside near far before after during since until while "
    "because although however therefore perhaps maybe often never always sometimes usually almost quite rather very "
    "too also only even still again already soon once twice here there where when why how who what which this that "
    "these those each every some any many much few several both all none one two three four five six seven eight "
    "nine ten hundred thousand million first second third last next other another same different such own spoon "
    "winter summer autumn north south east west left middle top bottom front edge center circle triangle shape size "
    "weight length speed sound noise voice song drum bell ring coat shirt dress skirt jacket hat glove sock boot belt "
    "pocket button needle thread basket bucket barrel box bag bottle jar lid key lock nail screw hammer saw drill "
    "ladder shovel plow tractor wagon sled tent camp flag map compass rail tunnel bridge canal dam well pump pipe wire"
).split()
"""Plain words without any weight (some twice: they are drawn more often): random text is made of them."""
