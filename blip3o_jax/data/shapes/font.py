"""Define a bitmap font of capital letters, 5 x 7 dots each.

Every letter touches all four sides of its cell and differs clearly from the others, so that a
word's bounding box alone determines where each letter is.
"""

import numpy as np

WIDTH, HEIGHT, SPACING = 5, 7, 3  # of a letter and between two, in dots

_ROWS = """
A .###. #...# #...# ##### #...# #...# #...#
B ####. #...# #...# ####. #...# #...# ####.
C .#### #.... #.... #.... #.... #.... .####
D ###.. #..#. #...# #...# #...# #..#. ###..
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .#### #.... #.... #.### #...# #...# .####
H #...# #...# #...# ##### #...# #...# #...#
I ##### ..#.. ..#.. ..#.. ..#.. ..#.. #####
J ..### ...#. ...#. ...#. ...#. #..#. .##..
K #...# #..#. #.#.. ##... #.#.. #..#. #...#
L #.... #.... #.... #.... #.... #.... #####
M #...# ##.## #.#.# #.#.# #...# #...# #...#
N #...# ##..# ##..# #.#.# #..## #..## #...#
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
Q .###. #...# #...# #...# #.#.# #..#. .##.#
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
V #...# #...# #...# #...# .#.#. .#.#. ..#..
W #...# #...# #...# #.#.# #.#.# ##.## #...#
X #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
"""

GLYPHS: dict[str, np.ndarray] = {
    line[0]: np.array([[dot == "#" for dot in row] for row in line.split()[1:]])
    for line in _ROWS.strip().splitlines()
}


def bitmap(text: str) -> np.ndarray:
    """Return the word's letters with SPACING empty columns between them: bool [7, 8 n - 3]."""
    unknown = sorted(set(text) - set(GLYPHS))
    if unknown or not text:
        raise ValueError(f"cannot write {text!r}: the font has the letters A to Z only")
    space = np.zeros((HEIGHT, SPACING), bool)
    parts = [part for letter in text for part in (GLYPHS[letter], space)]
    return np.concatenate(parts[:-1], axis=1)
