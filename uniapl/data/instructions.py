"""Plain instructions of the local data set: templates filled with topics, all asking for short answers.

Training and held-out instructions are made of disjoint topics. Texts are the project's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Per kind of topic: templates with {t} for the topic (and {u} for the second one of a comparison).
TEMPLATES: dict[str, tuple[str, ...]] = {
    "concept": (
        "Explain {t} in one sentence.",
        "What is {t}? Answer in one sentence.",
        "Explain {t} to a child in two short sentences.",
        "In a sentence or two, why does {t} matter?",
        "Give a short definition of {t}.",
        "How would you describe {t} to a friend? Keep it to one sentence.",
        "Tell me something interesting about {t} in one sentence.",
    ),
    "thing": (
        "Describe {t} in one sentence.",
        "Write a one-sentence advertisement for {t}.",
        "What is {t} used for? Answer in one or two sentences.",
        "Write a two-line poem about {t}.",
        "Give one tip for taking care of {t} in one sentence.",
        "Why is {t} useful? Answer briefly.",
    ),
    "place": (
        "Describe {t} to a traveller in one sentence.",
        "Why do people like to visit {t}? Answer in one or two sentences.",
        "Write a two-line poem about {t}.",
        "What can one see at {t}? Keep it short.",
        "Write the opening sentence of a story set at {t}.",
    ),
    "animal": (
        "Describe {t} in two short sentences.",
        "What do {t} eat? Answer in one sentence.",
        "State one interesting fact about {t}.",
        "Write a two-line poem about {t}.",
        "Why are {t} important in nature? Answer in one or two sentences.",
        "What could people learn from {t}? Answer in a sentence or two.",
    ),
    "food": (
        "Describe the taste of {t} in one or two sentences.",
        "Explain in two short sentences how {t} is usually made.",
        "Write a one-sentence menu entry for {t}.",
        "Why do so many people enjoy {t}? Answer in one sentence.",
        "Write one sentence that recommends {t} to a friend.",
        "What is {t} made of? Keep it short.",
    ),
    "activity": (
        "Give a beginner one tip about {t} in one sentence.",
        "Why is {t} good for people? Answer in one or two sentences.",
        "Describe what {t} feels like in two short sentences.",
        "What does one need to get started with {t}? Answer in one sentence.",
        "Write a motivational message about {t}, two sentences at most.",
        "In a sentence or two, how does {t} help one to relax?",
    ),
    "job": (
        "What does {t} do all day? Answer in one or two sentences.",
        "Name one skill that {t} needs and say why, in one sentence.",
        "Write a one-sentence job advertisement for {t}.",
        "Why would a person want to become {t}? Keep it short.",
        "Why is the work of {t} important? Answer in one sentence.",
    ),
    "occasion": (
        "Suggest one idea for {t} in one sentence.",
        "What should one remember about {t}? Answer in one sentence.",
        "Describe {t} in two short sentences.",
        "Write the opening sentence of a story about {t}.",
    ),
    "pair": (
        "What is the main difference between {t} and {u}? Answer in one or two sentences.",
        "Name one thing that {t} and {u} have in common, in one sentence.",
        "Compare {t} and {u} in two short sentences.",
    ),
}

# Topics of each kind, separated by semicolons: those of training, then those of the held-out split.
TRAIN_TOPICS: dict[str, str] = {
    "concept": "photosynthesis; gravity; inflation; friendship; recycling; evaporation; democracy; electricity; "
    "compound interest; teamwork; the water cycle; climate change; a computer algorithm; patience; supply and demand; "
    "magnetism; the immune system; a budget; a metaphor; erosion; time management; curiosity; renewable energy; "
    "the seasons; courage; a balanced diet; peer pressure; machine learning; sound waves; a volcano; honesty; "
    "biodiversity; an ecosystem; a solar eclipse; trade; critical thinking; osmosis; leadership; fractions; insurance",
    "thing": "a bicycle; an umbrella; a wooden chair; a reading lamp; a pocket knife; a telescope; a winter coat; "
    "a coffee machine; a notebook; a backpack; a violin; a garden hose; an alarm clock; a paper map; a ceramic mug; "
    "a sewing machine; a smartphone; a board game; a candle; a hammer; a raincoat; a rocking chair; a camera; "
    "a fountain pen; a kite; a sleeping bag; a pair of headphones; a bookshelf; a cast iron pan; a houseplant; "
    "a toolbox; a hammock; a thermos; a jigsaw puzzle",
    "place": "a mountain lake; a night market; a public library; a sandy beach; a desert; an old castle; "
    "a train station; a rainforest; a farmers market; a science museum; a fishing village; a waterfall; a city park; "
    "a ski resort; an island; a quiet monastery; a vineyard; a botanical garden; a harbor; a national park; "
    "a bakery at dawn; a football stadium; a ghost town; a hot spring",
    "animal": "elephants; honeybees; owls; dolphins; penguins; wolves; hedgehogs; octopuses; giraffes; beavers; "
    "bats; sea turtles; squirrels; kangaroos; ants; foxes; frogs; camels; horses; spiders; crows; polar bears; "
    "salmon; butterflies",
    "food": "tomato soup; apple pie; fried rice; sourdough bread; a cheese omelette; vegetable curry; pancakes; "
    "hummus; mushroom risotto; chicken noodle soup; a fruit salad; dark chocolate; roasted potatoes; lemonade; "
    "spaghetti with garlic; banana bread; a grilled sandwich; green tea; bean chili; vanilla ice cream; "
    "pumpkin soup; sushi; tacos; oatmeal",
    "activity": "gardening; swimming; chess; hiking; baking bread; painting; birdwatching; yoga; learning a language; "
    "photography; playing the guitar; running; knitting; journaling; rock climbing; cooking at home; dancing; "
    "fishing; public speaking; meditation; cycling; woodworking; stargazing; volunteering; writing letters; "
    "learning to code; singing in a choir; playing football",
    "job": "a nurse; a firefighter; a primary school teacher; a carpenter; a librarian; a bus driver; a baker; "
    "a software engineer; a farmer; a journalist; a dentist; an architect; a pilot; a gardener; a veterinarian; "
    "a chef; a police officer; a marine biologist; a tailor; a museum guide; an electrician; a translator",
    "occasion": "a birthday party; a team meeting; a school trip; a move to a new house; a book club evening; "
    "a summer picnic; a job interview; a charity run; a wedding; a dinner invitation; a retirement party; "
    "a neighbourhood clean-up; a family reunion; a study group; a garage sale; a farewell lunch; a film night; "
    "a bake sale; a surprise visit; a long train journey; a camping trip; a job fair; a garden party",
    "pair": "tea and coffee; cats and dogs; trains and buses; books and films; summer and winter; rice and pasta; "
    "a lake and a river; running and walking; email and letters; cities and villages; apples and oranges; "
    "planes and ships; pencils and pens; breakfast and dinner; violins and guitars; renting and buying; "
    "wood and stone; sunrise and sunset; cash and cards; tents and cabins; football and tennis; gold and silver; "
    "moths and wasps; soup and salad; mornings and evenings; radio and television",
}

HELDOUT_TOPICS: dict[str, str] = {
    "concept": "the greenhouse effect; empathy; condensation; a monopoly; natural selection; a prime number; "
    "plate tectonics; generosity",
    "thing": "a compass; a wool blanket; a piano; a microscope; a lunch box; a skateboard; a hand mirror",
    "place": "a lighthouse; an art gallery; a canyon; a greenhouse; a covered bridge",
    "animal": "flamingos; koalas; otters; sharks; ladybugs",
    "food": "carrot cake; lentil stew; popcorn; a blueberry muffin; pizza",
    "activity": "sailing; pottery; archery; calligraphy; juggling; beekeeping",
    "job": "a plumber; an astronomer; a florist; a lifeguard; a photographer",
    "occasion": "a graduation; a power cut; a housewarming; a science fair; a street festival; a treasure hunt",
    "pair": "lemons and limes; skiing and snowboarding; oil and vinegar; mice and rats; poems and essays",
}


@dataclass(frozen=True)
class Instruction:
    """A plain instruction, without constraints. `topic` has no leading article."""

    split: str
    kind: str
    topic: str
    text: str


def plain_instructions(seed: int) -> list[Instruction]:
    """Every template filled with every topic of its kind, in a seeded order; training first, then held-out."""
    made = []
    for split, topics in (("train", TRAIN_TOPICS), ("heldout", HELDOUT_TOPICS)):
        part = [
            _fill(split, kind, template, topic.strip())
            for kind, templates in TEMPLATES.items()
            for topic in topics[kind].split(";")
            for template in templates
        ]
        random.Random(f"{seed}/{split}").shuffle(part)
        made += part
    return made


def _fill(split: str, kind: str, template: str, topic: str) -> Instruction:
    first, _, second = topic.partition(" and ") if kind == "pair" else (topic, "", "")
    return Instruction(split, kind, without_article(topic), template.format(t=first, u=second))


def without_article(topic: str) -> str:
    """`a bicycle` as `bicycle`."""
    first, _, rest = topic.partition(" ")
    return rest if first in ("a", "an", "the") else topic
