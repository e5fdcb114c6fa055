"""Answers of MATH as strings: the last box of a solution, and LaTeX in one spelling.

Hendrycks et al. 2021 (arXiv 2103.03874) count two answers as the same if their strings are, once
spaces, units and several spellings of fractions and roots are made one. The rules are theirs.
"""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
REMOVED = (r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", r"\%", "%", "\n")
RENAMED = {r"\\": "\\", "tfrac": "frac", "dfrac": "frac", " .": " 0.", "{.": "{0."}
LONG_LEFT_SIDE = 2


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\boxed x`) of a text holds; None without one."""
    found = list(BOX.finditer(text))
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0] or None
    end = closing_brace(text, start)
    return None if end is None else text[start + 1 : end]


def closing_brace(text: str, opening: int) -> int | None:
    """Where the brace closes that is opened at `opening`."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return None


def normalised(text: str) -> str:
    """An answer in one spelling."""
    for part in REMOVED[:1] + REMOVED[-1:]:
        text = text.replace(part, "")
    for old, new in list(RENAMED.items())[:3]:
        text = text.replace(old, new)
    for part in REMOVED[1:-1]:
        text = text.replace(part, "")
    text = text.split(r"\text{ ")[0]  # a unit
    for old, new in list(RENAMED.items())[3:]:
        text = text.replace(old, new)
    text = f"0{text}" if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= LONG_LEFT_SIDE:
        text = right
    text = re.sub(r"\\sqrt([^{\s])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?:\{([^{}]*)\}|([^{}]))([^{}])", brace_fraction, text)
    text = re.sub(r"\\frac([^{}])(?=\{)", r"\\frac{\1}", text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"\A(-?\d+)/(-?\d+)\Z", r"\\frac{\1}{\2}", text)


def brace_fraction(match: re.Match[str]) -> str:
    r"""`\frac12` -> `\frac{1}{2}`."""
    return rf"\frac{{{match[1] or match[2]}}}{{{match[3]}}}"
