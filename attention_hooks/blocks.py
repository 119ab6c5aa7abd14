"""Names of a network's attention layers and the small language that selects some of them."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer block (a self- and a cross-attention, or one joint attention) or one residual block of a network.

    Attributes:
        part, number: ComfyUI's block name, such as "output", 6 or "double", 18.
        index: which transformer block of the spatial transformer; which residual block of the block.
        level: how often the latent was halved on the way to its grid.
        width: channels of q, k and v, or of the residual block's output.
        order: position in the order of execution, over layers and residual blocks together.
        joint: whether words and picture share one attention.
    """

    part: str
    number: int
    index: int
    level: int
    width: int
    order: int
    joint: bool = False

    @property
    def site(self):
        """The attention in which the picture looks at itself: "joint", or "attn1"."""
        return "joint" if self.joint else "attn1"

    @property
    def words_site(self):
        """The attention in which the picture looks at the words: "joint", or "attn2"."""
        return "joint" if self.joint else "attn2"

    @property
    def key(self):
        """As in ComfyUI's `attn1_replace`: (part, number, index)."""
        return self.part, self.number, self.index

    @property
    def name(self):
        return f"{self.part}.{self.number}.{self.index}"

    def grid(self, size):
        """Height and width of its token grid for a latent of `size` (every halving rounds up)."""
        return tuple(-(-side // 2**self.level) for side in size)


@dataclass(frozen=True)
class Layout:
    """A network's transformer blocks and residual blocks, in order of execution.

    Attributes:
        name: of the family, where the backbone knows it; U-Nets are known by their blocks.
    """

    layers: tuple[Layer, ...]
    resblocks: tuple[Layer, ...]
    name: str = ""

    @property
    def joint(self):
        """Whether it is a network of transformer blocks alone, without residual blocks."""
        return bool(self.name)

    @property
    def kind(self):
        """Whose blocks these are, as PRESETS have it: "SD" (1.x and 2.x), "SDXL", "Flux", ..., "other" or "transformer"."""
        places = {(layer.part, layer.number) for layer in self.layers}
        for kind, (name, known) in _KINDS.items():
            if name == self.name and places == known:
                return kind
        return "transformer" if self.joint else "other"


def _numbered(**parts):
    return {(part, number) for part, count in parts.items() for number in range(count)}


_KINDS = {  # kind: (Layout.name, places)
    "SD": ("", {*(("input", n) for n in (1, 2, 4, 5, 7, 8)), ("middle", 0), *(("output", n) for n in range(3, 12))}),
    "SDXL": ("", {*(("input", n) for n in (4, 5, 7, 8)), ("middle", 0), *(("output", n) for n in range(6))}),
    "Flux": ("Flux", _numbered(double=19, single=38)),
    "demo": ("Flux", _numbered(double=3, single=6)),
    "SD3-medium": ("SD3", _numbered(double=24)),
    "SD3.5-medium": ("SD3.5", _numbered(double=24)),
    "SD3.5-large": ("SD3", _numbered(double=38)),
}

# Names for the layers that the papers use. MasaCtrl's start layer 10 of 16 is SD's output.6; of SDXL's 70 its authors
# tried 44 (output.1), 54 and 64. Plug-and-Play has no published SDXL layers: the same stage of the decoder.
# Of transformers: the blocks in which words are seen best are from arXiv 2508.07519 (five a model; it counts single blocks
# after double ones), MasaCtrl's on Flux the vital layers of Stable Flow (arXiv 2411.14430), on SD3.5-medium LayerVerse's.
# The demo flow model's were measured. For others nothing is published: shares of the depth,
# in which the published lists agree (words in the middle, look late).
PRESETS = {
    "p2p": {"other": "@<=1/2", "transformer": "all"},
    "words": {
        "other": "input@16, output@16", "transformer": "30%-60%", "demo": "single.1-2",
        "Flux": "double.11-12, double.14, double.17-18", "SD3-medium": "double.4-5, double.7-9",
        "SD3.5-large": "double.16, double.18, double.20-21, double.24",
    },
    "masactrl": {
        "SD": "output.6-11", "SDXL": "output.1-5", "other": "output@>=1/2",
        "Flux": "double.0-1, double.17-18, single.6, single.9, single.34-35, single.37",
        "SD3.5-medium": "double.0-1, double.3-4, double.12, double.14, double.17-23", "demo": "single.3-5",
        "transformer": "50%-100%",
    },
    "pnp": {"SD": "output.4-11", "SDXL": "output.1-5", "other": "output.1-", "transformer": "all"},
    "pnp_features": {"SD": "output.4", "SDXL": "output.1", "other": "output.1", "transformer": "none"},
}

HELP = (
    "Blocks, separated by commas: 'all', 'none', 'input', 'middle', 'output', 'output.6', 'output.3-5', 'output.6-', "
    "'input.7.0-3' (transformer blocks within), each with a resolution if wanted: '@1/2' (half the latent's side), "
    "'@<=1/2', '@16' (the grid nearest to 16 x 16), and '-' before what to leave out: '@<=1/2, -middle'. Flow models: "
    "'double.0-18', 'single.20-37', or a share of the depth: '30%-60%'."
)


def preset_help(name):
    """The blocks that a preset names, for tooltips."""
    texts = PRESETS[name]
    if "SD" not in texts:
        return f"'{name}' is {texts['other']}, on flow models {texts['transformer']} or what is published."
    more = "" if texts["transformer"] == "none" else f", {texts['transformer']} or what is published on flow models"
    return f"'{name}' is {texts['SD']} on SD 1.x and 2.x, {texts['SDXL']} on SDXL{more}."


def at_quarter_resolution(layout: Layout, size: tuple[int, int]) -> list[tuple]:
    """Keys of the layers at a quarter of the latent's resolution, down and up, whose maps StyleDiffusion compares.

    For SD 1.x at 512 x 512 the paper's five at 16 x 16. Of transformers of several layers (SDXL) the last; where a
    network has no such level, the nearest.

    Args:
        size: height and width of the latent.
    """
    last = {(layer.part, layer.number): layer for layer in layout.layers if layer.part in ("input", "output")}

    def distance(layer):
        return abs(math.log(math.prod(layer.grid(size)) / (math.prod(size) / 16)))

    nearest = min(map(distance, last.values()), default=0)
    return [layer.key for layer in last.values() if math.isclose(distance(layer), nearest)]


_TERM = re.compile(
    r"(?:(?P<first>\d{1,3})%-(?P<last>\d{1,3})%|(?P<part>all|input|middle|output|double|single))?(?:\.(?P<numbers>\d{1,4}(?:-\d{0,4})?))?(?:\.(?P<indices>\d{1,4}(?:-\d{0,4})?))?"
    r"(?:@(?P<compare><=|>=)?(?P<size>0*[1-9]\d{0,4}(?:/0*[1-9]\d{0,4})?))?"
)


def select(text, layers, layout, size):
    """The layers that a text names.

    Args:
        text: see `HELP`; names in PRESETS stand for the layers of the model at hand.
        layers: `Layer`s to choose from: `layout.layers` or `layout.resblocks`.
        layout: the model's, for presets.
        size: height and width of the latent, for '@16'.

    Returns:
        frozenset of `Layer.key`.

    Raises:
        ValueError: a term that cannot be read, or names no block of this model.
    """
    chosen = set()
    for term in re.split(r"[,\n]", text):
        term = re.sub(r"\s+", "", term).lower()
        if not term or term == "none":
            continue
        minus, name = term.startswith("-"), term.lstrip("-")
        if name in PRESETS:
            texts = PRESETS[name]
            general = texts["transformer" if layout.joint else "other"]
            keys = select(texts.get(layout.kind, general), layers, layout, size)
        else:
            keys = _match(name, layers, size, layout)
        chosen = chosen - keys if minus else chosen | keys
    return frozenset(chosen)


def _match(term, layers, size, layout):
    read = _TERM.fullmatch(term)
    share = read and read["first"] and (int(read["first"]) / 100, int(read["last"]) / 100)
    if not read or (read["numbers"] and read["part"] in (None, "all")) or (share and not 0 <= share[0] < share[1] <= 1):
        raise ValueError(f"'{term[:40]}' is no block selection. {HELP}")
    keys = [x for x in layers if read["part"] in (None, "all", x.part)]
    if share:
        deepest = max(x.order for x in (*layout.layers, *layout.resblocks)) + 1
        keys = [x for x in keys if share[0] <= (x.order + 0.5) / deepest < share[1]]
    for field, wanted in (("number", read["numbers"]), ("index", read["indices"])):
        if wanted:
            first, _, last = wanted.partition("-")
            last = int(last) if last else int(first) if "-" not in wanted else 10**9
            if last < 10**9 and not any(getattr(x, field) == last for x in keys):
                raise _unknown(term, layers)
            keys = [x for x in keys if int(first) <= getattr(x, field) <= last]
    if read["size"]:
        keys = [x for x in keys if _fits(x.level, read["compare"], read["size"], keys, size)]
    if not keys:
        raise _unknown(term, layers)
    return {x.key for x in keys}


def _fits(level, compare, wanted, layers, size):
    if "/" in wanted or wanted == "1":
        above, _, below = wanted.partition("/")
        target = math.log2(int(below or 1) / int(above))
    else:
        side = math.sqrt(size[0] * size[1])
        target = min({x.level for x in layers}, key=lambda n: abs(math.log2(side / 2**n / int(wanted))))
    if compare == "<=":
        return level >= target
    return level <= target if compare == ">=" else level == target


def _unknown(term, layers):
    names = {}
    for x in layers:
        names.setdefault(f"{x.part}.{x.number}", f"@1/{2**x.level}" if x.level else "@1")
    has = ", ".join(f"{name} ({resolution})" for name, resolution in names.items())
    return ValueError(f"This model has no block '{term}'. It has: {has}.")
