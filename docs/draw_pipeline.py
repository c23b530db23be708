"""Draw `pipeline.svg` from comments of `keras_rmsprop/step.py`: a name, a formula.

Run it when a stage changes: `python docs/draw_pipeline.py`. A test sees to it.
"""

import html
import re
from pathlib import Path

HERE = Path(__file__).parent
STEP = HERE.parent / "keras_rmsprop" / "step.py"
SIGNS = {"<-": "←", "eta": "η", "omega": "ω", "mu": "μ", "rho": "ρ", "eps": "ε"}
WITHIN = {"Clip", "Decay", "Search", "Update"}
"""The stages that happen at each n-th call only, with `gradient_accumulation_steps`."""
ORDER = ["Check", "Distinct rows", "Skip", "Overwrite", "Unscale", "Accumulate"]
ORDER += ["Clip", "Search", "Decay", "Update", "Average", "Constrain", "Count"]
"""The order in which they run; functions are written before they are called."""
WIDTH, HEIGHT, GAP = 760, 34, 10


def stages() -> dict[str, str]:
    """Return what each stage does, by its name."""
    found = re.findall(r"^ *# ([A-Z][a-z ]+): (.*?)\.?$", STEP.read_text(), re.M)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(x)}(?!\w)" for x in SIGNS))
    texts = {name: pattern.sub(lambda x: SIGNS[x[0]], text) for name, text in found}
    return {name: texts[name] for name in ORDER}  # a stage that is missing fails


def drawn() -> str:
    """Return the picture."""
    formulas = stages()
    height = len(ORDER) * (HEIGHT + GAP) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>The stages of a step</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, name in enumerate(ORDER):
        y, x = GAP + number * (HEIGHT + GAP), 40 if name in WITHIN else 10
        lines += [
            f'<rect x="{x}" y="{y}" width="{WIDTH - x - 10}" height="{HEIGHT}" rx="5" '
            f'fill="{"#fdf1d8" if name in WITHIN else "#e8f0fb"}" stroke="#8aa"/>',
            f'<text x="{x + 12}" y="{y + 22}" font-weight="bold">{name}</text>',
            f'<text x="190" y="{y + 22}">{html.escape(formulas[name])}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "pipeline.svg").write_text(drawn())
