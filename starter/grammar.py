"""A small world and a grammar that tells of it: stories to pre-train on, and questions about them to fine-tune on.

Everything is drawn from a `random.Random`, so a seed fixes every text. Stories state who did what, where and with how many
things; the questions ask for exactly that, in a form the stories never show.
"""

import random
from dataclasses import dataclass

NAMES = (
    "Mira", "Otto", "Pia", "Bruno", "Lotte", "Karl", "Ida", "Hugo", "Tilda", "Emil", "Greta", "Anton", "Nora", "Felix",
    "Olga", "Leo",
)  # fmt: skip
ANIMALS = ("fox", "owl", "badger", "hare", "otter", "mouse", "hedgehog", "goose", "mole", "cat")
PLACES = ("harbour", "forest", "mill", "garden", "market", "lighthouse", "bridge", "meadow", "kitchen", "library")
THINGS = ("lantern", "kite", "key", "basket", "map", "drum", "boat", "bell", "ladder", "coat", "cup", "rope")
FOODS = ("apples", "plums", "nuts", "pears", "cherries", "carrots", "buns", "figs")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "silver", "orange")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
MOODS = ("happy", "tired", "proud", "hungry", "brave", "curious")
WEATHER = ("The sun was warm", "The wind was loud", "It rained a little", "The snow was deep", "The fog was thick")
OPPOSITES = (
    ("big", "small"), ("old", "new"), ("warm", "cold"), ("loud", "quiet"), ("fast", "slow"), ("heavy", "light"),
    ("early", "late"), ("long", "short"), ("dark", "bright"), ("full", "empty"),
)  # fmt: skip
VERBS = (  # present, past, of things
    ("finds", "found"), ("carries", "carried"), ("hides", "hid"), ("paints", "painted"), ("mends", "mended"),
    ("borrows", "borrowed"), ("brings", "brought"), ("loses", "lost"), ("buys", "bought"), ("washes", "washed"),
)  # fmt: skip


def a(words: str) -> str:
    """With its article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What one story is about."""

    name: str
    animal: str
    friend: str
    friend_animal: str
    verb: tuple[str, str]
    colour: str
    thing: str
    place: str
    next_place: str
    number: str
    food: str
    mood: str


def draw_scene(rng: random.Random) -> Scene:
    """Two different animals, two different places."""
    name, friend = rng.sample(NAMES, 2)
    animal, friend_animal = rng.sample(ANIMALS, 2)
    place, next_place = rng.sample(PLACES, 2)
    return Scene(
        name, animal, friend, friend_animal, rng.choice(VERBS), rng.choice(COLOURS), rng.choice(THINGS), place,
        next_place, rng.choice(NUMBERS), rng.choice(FOODS), rng.choice(MOODS),
    )  # fmt: skip


def tell(scene: Scene, rng: random.Random) -> list[str]:
    """The scene in past-tense sentences."""
    s = scene
    opening = rng.choice((
        f"{s.name} the {s.animal} lived near the {s.place}.",
        f"One morning {s.name} the {s.animal} walked to the {s.place}.",
        f"{s.name} was {a(rng.choice(('big', 'small', 'old', 'young')))} {s.animal}.",
    ))  # fmt: skip
    deed = f"At the {s.place} {s.name} {s.verb[1]} {a(s.colour)} {s.thing}."
    meeting = rng.choice((
        f"{s.friend} the {s.friend_animal} came along and had {s.number} {s.food}.",
        f"Then {s.friend} the {s.friend_animal} brought {s.number} {s.food}.",
    ))  # fmt: skip
    move = rng.choice((
        f"They took the {s.colour} {s.thing} to the {s.next_place}.",
        f"Together they went to the {s.next_place}.",
        f"{s.name} and {s.friend} ran to the {s.next_place}.",
    ))  # fmt: skip
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    speech = rng.choice((
        f'"What a fine {s.thing}," said {s.friend}.',
        f'"The {s.next_place} is not far," said {s.friend}.',
        f"{rng.choice(WEATHER)}.",
        f"The {s.thing} was not {pair[0]} but {pair[1]}.",
        f"The {s.thing} was not {pair[0]} but {pair[1]}.",
    ))  # fmt: skip
    recalls = rng.sample((  # a reader who does not remember the beginning cannot tell how these go on
        f"They ate the {s.number} {s.food} and went home.",
        f"It was {s.name} who {s.verb[1]} the {s.thing} at the {s.place}.",
        f"{s.name} the {s.animal} and {s.friend} the {s.friend_animal} were {s.mood}.",
        f"The {s.thing} was {s.colour}, and there were {s.number} {s.food}.",
        f"{s.friend} was {a(s.friend_animal)}, and {s.name} was {a(s.animal)}.",
    ), 2)  # fmt: skip
    return [opening, deed, meeting, move, speech, *recalls]


def story(rng: random.Random) -> str:
    """One short story."""
    sentences = tell(draw_scene(rng), rng)
    return " ".join(sentences)


def instruction(rng: random.Random) -> dict[str, str]:
    """A prompt whose answer follows from the prompt alone (or from common words), and that answer."""
    return rng.choice(TASKS)(rng)


def _about_a_story(rng: random.Random) -> dict[str, str]:
    scene = draw_scene(rng)
    s, text = scene, " ".join(tell(scene, rng)[1:4])
    question, answer = rng.choice((
        (f"Who {s.verb[1]} the {s.thing}?", s.name),
        (f"Where did {s.name} go first?", f"to the {s.place}"),
        (f"What colour is the {s.thing}?", s.colour),
        (f"How many {s.food} are there?", s.number),
        (f"Which animal is {s.friend}?", a(s.friend_animal)),
    ))  # fmt: skip
    return _ask(f"Read: {text}\nQuestion: {question}", answer)


def _opposite(rng: random.Random) -> dict[str, str]:
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    return _ask(f"Question: What is the opposite of {pair[0]}?", pair[1])


def _past(rng: random.Random) -> dict[str, str]:
    s = draw_scene(rng)
    rest = f"{a(s.colour)} {s.thing} at the {s.place}."
    return _ask(f"Put into the past: {s.name} {s.verb[0]} {rest}", f"{s.name} {s.verb[1]} {rest}")


def _animals(rng: random.Random) -> dict[str, str]:
    s = draw_scene(rng)
    text = f"{s.name} the {s.animal} met {s.friend} the {s.friend_animal} at the {s.place}."
    return _ask(f"List the animals: {text}", f"{s.animal}, {s.friend_animal}")


def _ask(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": f"{prompt}\nAnswer:", "completion": f" {answer}"}


TASKS = (_about_a_story, _about_a_story, _about_a_story, _opposite, _past, _animals)
