"""The real-world tables behind the demo's fact questions. Imported by questions.py; nothing to run."""

from __future__ import annotations

CAPITALS: dict[str, str] = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Austria": "Vienna",
    "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw", "Hungary": "Budapest", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin", "Russia": "Moscow",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Japan": "Tokyo",
    "China": "Beijing", "India": "Delhi", "Iran": "Tehran", "Iraq": "Baghdad", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa",
    "Serbia": "Belgrade", "Belgium": "Brussels",
    "Vietnam": "Hanoi", "Syria": "Damascus", "Libya": "Tripoli",
}  # fmt: skip

# (name, symbol) in order of atomic number, from hydrogen = 1 to zinc = 30.
ELEMENTS: list[tuple[str, str]] = [
    ("hydrogen", "H"), ("helium", "He"), ("lithium", "Li"), ("beryllium", "Be"), ("boron", "B"),
    ("carbon", "C"), ("nitrogen", "N"), ("oxygen", "O"), ("fluorine", "F"), ("neon", "Ne"),
    ("sodium", "Na"), ("magnesium", "Mg"), ("aluminium", "Al"), ("silicon", "Si"), ("phosphorus", "P"),
    ("sulfur", "S"), ("chlorine", "Cl"), ("argon", "Ar"), ("potassium", "K"), ("calcium", "Ca"),
    ("scandium", "Sc"), ("titanium", "Ti"), ("vanadium", "V"), ("chromium", "Cr"), ("manganese", "Mn"),
    ("iron", "Fe"), ("cobalt", "Co"), ("nickel", "Ni"), ("copper", "Cu"), ("zinc", "Zn"),
]  # fmt: skip

OPPOSITES: list[tuple[str, str]] = [
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("up", "down"), ("left", "right"), ("open", "shut"),
    ("fast", "slow"), ("high", "low"), ("day", "night"), ("black", "white"), ("good", "bad"), ("rich", "poor"),
    ("wet", "dry"), ("hard", "soft"), ("long", "short"), ("light", "dark"), ("love", "hate"), ("win", "lose"),
    ("first", "last"), ("full", "empty"), ("early", "late"), ("true", "false"), ("war", "peace"), ("near", "far"),
    ("push", "pull"), ("north", "south"), ("east", "west"), ("buy", "sell"), ("start", "stop"), ("inside", "outside"),
]  # fmt: skip

WORDS: list[str] = [
    "ant", "arm", "bag", "bed", "bee", "box", "bus", "cap", "cat", "cow", "cup", "dog", "ear", "egg", "eye", "fan",
    "fig", "fox", "gate", "goat", "hat", "hen", "ice", "ink", "jam", "jar", "key", "kite", "lamp", "leg", "map", "moon",
    "nail", "net", "oak", "owl", "pen", "pig", "queen", "rat", "ring", "sea", "sun", "tea", "tree", "urn", "van",
    "vest", "wall", "web", "yak", "zoo",
]  # fmt: skip
