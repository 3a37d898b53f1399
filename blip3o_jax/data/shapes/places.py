"""Name the places where an object can stand: "top left", "centre", "bottom"."""

from blip3o_jax.data.shapes.scene import SPOTS, Thing

_COLUMNS, _ROWS = ("left", "centre", "right"), ("top", "centre", "bottom")


def name(x: float, y: float) -> str:
    """Return the name of the third of the image, along each axis, that contains the point; `x` and
    `y` are fractions of the side."""
    column, row = (names[min(int(side * 3), 2)] for names, side in ((_COLUMNS, x), (_ROWS, y)))
    if "centre" in (column, row):
        return column if row == "centre" else row
    return f"{row} {column}"


def named(size: str) -> dict[str, tuple[float, float]]:
    """Return {place: centre} of the places that an object of this size can have.

    A large one is between the middles of the thirds.
    """
    spots = SPOTS[size]
    return {_name_of(size, x, y): (x, y) for y in spots for x in spots}


def of(thing: Thing) -> str:
    """Return the name of the place of an object."""
    return _name_of(thing.size, thing.x, thing.y)


def _name_of(size: str | None, x: float, y: float) -> str:
    if size == "large":  # two spots each way, at a third and two thirds
        return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    return name(x, y)
