"""An emoji for every class: the one its label starts with, or the one that emoji names and label words agree on."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import emoji

from prisma_core.plugin import checked

FALLBACK = "🔹"
"""Stands for a class no emoji name fits; the class's name is always beside it."""

# Words of everyday labels that no emoji is named after, under the emoji name of their kind. Not a list of classes.
_KINDS = {
    "dog": "terrier retriever spaniel hound setter collie schnauzer pinscher mastiff pointer shepherd corgi husky "
    "malamute chihuahua pug beagle whippet basset weimaraner dane pekinese chow pomeranian samoyed papillon dalmatian "
    "vizsla rottweiler malinois kelpie komondor kuvasz boxer puppy maltese dingo dhole affenpinscher bouvier bulldog",
    "bird": "finch junco jay magpie bulbul robin chickadee ouzel kite vulture hornbill hummingbird jacamar coucal "
    "grouse ptarmigan partridge stork heron egret bittern crane bustard plover turnstone sandpiper dowitcher tern gull "
    "quail albatross pelican lorikeet limpkin oystercatcher",
    "lizard": "gecko iguana chameleon agama whiptail anole monitor newt eft salamander axolotl skink",
    "snake": "viper boa python cobra rattlesnake sidewinder mamba",
    "fish": "tench ray stingray sturgeon gar eel barracouta coho anemone_fish puffer",
    "monkey": "macaque baboon langur guenon marmoset capuchin tamarin colobus titi indri lemur patas",
    "gorilla": "ape gibbon siamang",
    "deer": "antelope gazelle impala hartebeest ibex",
    "cat": "tabby lynx cougar kitten",
    "bear": "panda_bear",
    "spider": "tarantula tick harvestman",
    "cricket": "grasshopper mantis cicada leafhopper walking_stick",
    "lobster": "crayfish langoustine",
    "automobile": "car limousine convertible cab wagon minivan jeep",
    "delivery_truck": "truck van pickup lorry",
    "bus": "coach minibus trolleybus",
    "ferry": "ship liner warship carrier wreck",
    "sailboat": "yawl schooner trimaran catamaran boat",
    "violin": "cello viola",
    "drum": "gong marimba maraca",
    "T-shirt": "sweatshirt jersey cardigan",
    "coat": "cloak poncho stole vestment",
    "bed": "crib cradle bassinet four-poster couch",
    "chair": "throne stool bench",
    "cup_with_straw": "glass goblet tumbler",
    "pot_of_food": "pot cooker caldron wok casserole pan",
    "bottle_with_popping_cork": "bottle flask jug",
    "desktop_computer": "screen monitor_screen computer television",
    "watch": "clock timer chronometer",
    "mosque": "minaret",
    "castle": "palace monastery fortress",
    "house": "barn boathouse greenhouse cottage yurt shed",
    "bridge_at_night": "bridge viaduct",
    "ring_buoy": "float buoy",
    "mushroom": "fungus agaric bolete stinkhorn gyromitra earthstar",
    "blossom": "flower daisy orchid slipper",
    "hammer": "hatchet mallet",
    "military_helmet": "helmet breastplate cuirass",
    "rooster": "cock",
    "chicken": "hen",
    "duck": "drake merganser coot",
    "parrot": "macaw cockatoo toucan grey",
    "crocodile": "alligator",
    "leopard": "jaguar cheetah",
    "rabbit": "hare",
    "necktie": "tie",
    "socks": "sock stocking",
    "jeans": "jean",
    "shorts": "trunks",
    "dress": "gown skirt overskirt miniskirt hoopskirt sarong abaya",
    "hamburger": "cheeseburger",
    "hot_beverage": "mug cup espresso",
    "bowl_with_spoon": "bowl soup",
    "wine_glass": "wine",
    "mountain": "alp cliff promontory valley",
    "beach_with_umbrella": "seashore lakeside sandbar",
    "package": "carton crate packet",
    "books": "library bookcase bookshop",
    "wastebasket": "ashcan dustbin",
    "musical_keyboard": "piano organ",
    "saxophone": "bassoon oboe clarinet",
    "fuel_pump": "pump",
    "radio": "player modem",
    "motor_scooter": "moped snowmobile",
    "bicycle": "tricycle unicycle rickshaw",
    "airplane": "warplane",
    "rocket": "missile shuttle projectile",
    "tractor": "harvester plow mower thresher forklift snowplow",
    "convenience_store": "shop store market",
    "knife": "cleaver",
    "bathtub": "tub",
    "classical_building": "arch obelisk pedestal dome",
}


class Symbol(NamedTuple):
    """The display of a class: its emoji, and its name without it."""

    emoji: str
    name: str


@checked
def symbol(label: str) -> Symbol:
    """Return the emoji and the plain name of a label.

    A label may bring its own emoji (``🔴 red circle``). Otherwise its names (``tabby, tabby cat``) are compared with
    the names of all emoji, from the whole name to its last word, and by the kinds of things words speak of.

    >>> symbol("🔴 red circle"), symbol("tiger cat").emoji
    (Symbol(emoji='🔴', name='red circle'), '🐈')
    """
    own = emoji.emoji_list(label)
    if own and own[0]["match_start"] == 0:
        return Symbol(own[0]["emoji"], label[own[0]["match_end"] :].strip() or label)
    names = [name.strip() for name in label.split(":")[0].split(",")]
    for rule in (_whole, _ending, _compound, _beginning):
        for name in names:
            found = rule(re.findall(r"[a-z]+", name.lower().replace("'s", "")))
            if found:
                return Symbol(found, names[0])
    return Symbol(FALLBACK, names[0])


@functools.cache
def _named() -> dict[str, str]:
    """Return emoji by name, most common first: words in lower case, and the words of ``_KINDS``."""
    table: dict[str, str] = {}
    for character, facts in emoji.EMOJI_DATA.items():
        if facts["status"] != emoji.STATUS["fully_qualified"] or "flag" in facts["en"] or facts["E"] > 15:
            continue
        for name in (facts["en"], *facts.get("alias", ())):
            words = " ".join(re.findall(r"[a-z]+", name.lower()))
            if len(words) > 2 and words not in _NOT_THINGS and "button" not in words:
                table.setdefault(words, character)
    for kind, words in _KINDS.items():
        for word in words.split():
            table.setdefault(word.replace("_", " "), table[" ".join(re.findall(r"[a-z]+", kind.lower()))])
    return table


_NOT_THINGS = frozenset("up top back soon end one two three stop man woman point person wind metal".split())  # noqa: SIM905


def _find(words: str) -> str | None:
    table = _named()
    for form in (words, words.removesuffix("s"), words.removesuffix("es"), words + " face"):
        if form in table:
            return table[form]
    return None


def _whole(words: list[str]) -> str | None:
    return _find(" ".join(words)) or _find("".join(words))


def _ending(words: list[str]) -> str | None:
    return next((found for start in range(1, len(words)) if (found := _find(" ".join(words[start:])))), None)


def _compound(words: list[str]) -> str | None:
    """``sheepdog`` ends in ``dog``."""
    last = words[-1] if words else ""
    tails = [last[start:] for start in range(2, len(last)) if len(last) - start > 3 or last[start:] == "dog"]
    return next((found for tail in tails if (found := _find(tail))), None)


def _beginning(words: list[str]) -> str | None:
    return next((found for word in words[:-1] if len(word) > 3 and (found := _find(word))), None)
