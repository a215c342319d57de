"""Problems with their working, for calibration scenes: mathematics, natural science, and the like in Chinese.

Imported by scenes.py; nothing to run. Each generator returns the question, the working, and the answer.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

Problem = tuple[str, str, str]
NAMES = ("Amira", "Jonas", "Mei", "Tunde", "Sofia", "Ravi", "Elena", "Kofi")
MASSES = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999, "Na": 22.990, "S": 32.06, "Cl": 35.45, "Ca": 40.078}
COMPOUNDS = {
    "water": {"H": 2, "O": 1}, "glucose": {"C": 6, "H": 12, "O": 6}, "sodium chloride": {"Na": 1, "Cl": 1},
    "calcium carbonate": {"Ca": 1, "C": 1, "O": 3}, "ammonia": {"N": 1, "H": 3},
    "sulfuric acid": {"H": 2, "S": 1, "O": 4},
    "ethanol": {"C": 2, "H": 6, "O": 1}, "sodium hydroxide": {"Na": 1, "O": 1, "H": 1},
}  # fmt: skip


def linear(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 19), rng.randint(-30, 30), rng.randint(-99, 99)
    c = a * x + b
    working = f"Move the constant to the right: {a}x = {c} - ({b}) = {c - b}. Divide by {a}: x = {c - b}/{a} = {x}."
    return (
        f"Solve for x: {a}x + ({b}) = {c}.",
        f"{working} Check: {a}·({x}) + ({b}) = {c}, as it should be.",
        f"x = {x}",
    )


def quadratic(rng: random.Random) -> Problem:
    p, q = sorted(rng.sample([n for n in range(-12, 13) if n], 2))
    b, c = -(p + q), p * q
    disc = b * b - 4 * c
    working = (
        f"The discriminant is b² - 4ac = ({b})² - 4·({c}) = {disc}, and √{disc} = {q - p}. So x = ({-b} ± {q - p})/2, "
        f"which gives {p} and {q}. By Vieta, their sum must be {-b} and their product {c}: both hold."
    )
    return f"Find all real roots of x² + ({b})x + ({c}) = 0.", working, f"x = {p} or x = {q}"


def greatest_divisor(rng: random.Random) -> Problem:
    g = rng.randint(2, 30)
    a, b = g * rng.randint(20, 90), g * rng.randint(5, 60)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} = {x // y}·{y} + {x % y}")
        x, y = y, x % y
    question = f"What is the greatest common divisor of {a} and {b}?"
    return question, "By Euclid's algorithm: " + "; ".join(steps) + f". The last divisor is {x}.", str(x)


def power_modulo(rng: random.Random) -> Problem:
    base, exponent, modulus = rng.randint(2, 15), rng.randint(9, 60), rng.choice((7, 11, 13, 17, 19, 23))
    steps, result, square, e = [], 1, base % modulus, exponent
    while e:
        if e & 1:
            result = result * square % modulus
            steps.append(f"the bit is set, so the product becomes {result}")
        square = square * square % modulus
        steps.append(f"the square becomes {square}")
        e >>= 1
    working = f"Square and multiply with {exponent} = {exponent:b} in binary: " + ", then ".join(steps[:-1]) + "."
    return f"Compute {base}^{exponent} mod {modulus}.", working, str(result)


def derivative(rng: random.Random) -> Problem:
    a, n, b, at = rng.randint(2, 9), rng.randint(3, 6), rng.randint(2, 12), rng.randint(-3, 3)
    value = a * n * at ** (n - 1) + b
    working = (
        f"By the power rule the derivative of {a}x^{n} is {a * n}x^{n - 1}, and that of {b}x is {b}. "
        f"So f'(x) = {a * n}x^{n - 1} + {b}, and f'({at}) = {a * n}·({at ** (n - 1)}) + {b} = {value}."
    )
    return f"Let f(x) = {a}x^{n} + {b}x. Find the slope of its graph at x = {at}.", working, str(value)


def two_draws(rng: random.Random) -> Problem:
    red, blue = rng.randint(3, 9), rng.randint(3, 9)
    n = red + blue
    both = Fraction(red * (red - 1) + blue * (blue - 1), n * (n - 1))
    working = (
        f"Two red ones: {red}/{n} · {red - 1}/{n - 1} = {red * (red - 1)}/{n * (n - 1)}. Two blue ones: "
        f"{blue}/{n} · {blue - 1}/{n - 1} = {blue * (blue - 1)}/{n * (n - 1)}. The cases exclude each other, so we add "
        f"them and reduce: {both}."
    )
    question = f"A bag holds {red} red and {blue} blue marbles. Two are drawn without replacement. "
    return question + "How probable is it that both have the same colour?", working, str(both)


def savings(rng: random.Random) -> Problem:
    name, start, rate, years = rng.choice(NAMES), 100 * rng.randint(5, 60), rng.randint(1, 6), rng.randint(2, 4)
    steps, balance = [], float(start)
    for year in range(1, years + 1):
        balance = round(balance * (1 + rate / 100), 2)
        steps.append(f"after year {year} there are {balance:.2f}")
    question = (
        f"{name} puts {start} euros into an account at {rate} % interest a year. How much is there after {years} years?"
    )
    return (
        question,
        f"Each year the balance is multiplied by {1 + rate / 100:.2f}: " + ", ".join(steps) + ".",
        f"{balance:.2f} euros",
    )


def free_fall(rng: random.Random) -> Problem:
    h = rng.randint(5, 200)
    t = math.sqrt(2 * h / 9.81)
    working = (
        f"With no air, h = g t²/2, so t = √(2h/g) = √({2 * h}/9.81) s = {t:.2f} s. The speed is v = g t = "
        f"9.81 · {t:.2f} m/s = {9.81 * t:.1f} m/s. Energy agrees: v = √(2gh)."
    )
    return (
        f"A stone falls from {h} m. How long does it fall, and how fast is it at the end?",
        working,
        f"{t:.2f} s, {9.81 * t:.1f} m/s",
    )


def resistors(rng: random.Random) -> Problem:
    a, b, u = rng.randint(2, 47) * 10, rng.randint(2, 47) * 10, rng.choice((5, 9, 12, 24))
    parallel = a * b / (a + b)
    working = (
        f"In parallel, 1/R = 1/{a} + 1/{b}, so R = {a}·{b}/({a} + {b}) Ω = {parallel:.1f} Ω. By Ohm's law "
        f"I = U/R = {u} V / {parallel:.1f} Ω = {1000 * u / parallel:.0f} mA, "
        f"and the power is U·I = {u * u / parallel:.2f} W."
    )
    question = (
        f"Resistors of {a} Ω and {b} Ω are connected in parallel to {u} V. What current flows, and what is the power?"
    )
    return question, working, f"{1000 * u / parallel:.0f} mA, {u * u / parallel:.2f} W"


def molar_mass(rng: random.Random) -> Problem:
    name, grams = rng.choice(list(COMPOUNDS)), rng.randint(5, 500)
    parts = COMPOUNDS[name]
    mass = sum(MASSES[e] * n for e, n in parts.items())
    terms = " + ".join(f"{n}·{MASSES[e]} ({e})" for e, n in parts.items())
    working = f"The molar mass is {terms} = {mass:.2f} g/mol. "
    working += f"The amount is {grams} g / {mass:.2f} g/mol = {grams / mass:.3f} mol."
    return f"How many moles are {grams} g of {name}?", working, f"{grams / mass:.3f} mol"


def half_life(rng: random.Random) -> Problem:
    half, periods = rng.randint(2, 90), rng.uniform(0.5, 5)
    time = round(half * periods, 1)
    left = 100 * 0.5 ** (time / half)
    working = f"The fraction left is (1/2)^(t/T) = (1/2)^({time}/{half}) = (1/2)^{time / half:.3f} = {left / 100:.4f}."
    return (
        f"A nuclide has a half-life of {half} days. What part of it is left after {time} days?",
        working,
        f"{left:.2f} %",
    )


def gas(rng: random.Random) -> Problem:
    n, celsius, litres = rng.randint(1, 40) / 10, rng.randint(-20, 120), rng.randint(2, 60)
    kilopascal = n * 8.314 * (celsius + 273.15) / litres
    working = (
        f"The ideal gas law is pV = nRT. T = {celsius} + 273.15 = {celsius + 273.15:.2f} K, so p = "
        f"{n} mol · 8.314 J/(mol K) · {celsius + 273.15:.2f} K / {litres} L = {kilopascal:.1f} kPa."
    )
    return (
        f"What is the pressure of {n} mol of an ideal gas in {litres} L at {celsius} °C?",
        working,
        f"{kilopascal:.1f} kPa",
    )


def chinese_shop(rng: random.Random) -> Problem:
    thing, unit = rng.choice((("苹果", "斤"), ("铅笔", "支"), ("笔记本", "本"), ("橙子", "斤"), ("毛巾", "条")))
    count, price, paid = rng.randint(3, 12), rng.randint(2, 15), 200
    total = count * price
    working = f"先算总价：{count}×{price}={total}元。再用付的钱减去总价：{paid}-{total}={paid - total}元。"
    return (
        f"小明买了{count}{unit}{thing}，每{unit}{price}元，付了{paid}元，应找回多少元？",
        working,
        f"{paid - total}元",
    )


def chinese_meeting(rng: random.Random) -> Problem:
    a, b, hours = rng.randint(40, 90), rng.randint(40, 90), rng.randint(2, 8)
    distance = (a + b) * hours
    working = f"两车相向而行，每小时靠近{a}+{b}={a + b}千米。相遇所需时间为{distance}÷{a + b}={hours}小时。"
    question = (
        f"甲、乙两地相距{distance}千米，两辆汽车同时从两地相对开出，速度分别为每小时{a}千米和{b}千米，几小时后相遇？"
    )
    return question, working, f"{hours}小时"


def chinese_rectangle(rng: random.Random) -> Problem:
    width, more = rng.randint(3, 40), rng.randint(1, 30)
    length = width + more
    around = 2 * (width + length)
    working = (
        f"设宽为x米，则长为x+{more}米。周长2(x+x+{more})={around}，所以4x={around}-{2 * more}={around - 2 * more}，"
        f"x={width}。长为{length}米，面积为{width}×{length}={width * length}平方米。"
    )
    return f"一个长方形的长比宽多{more}米，周长是{around}米，求面积。", working, f"{width * length}平方米"


MATHEMATICS = (linear, quadratic, greatest_divisor, power_modulo, derivative, two_draws, savings)
SCIENCE = (free_fall, resistors, molar_mass, half_life, gas)
CHINESE = (chinese_shop, chinese_meeting, chinese_rectangle)
