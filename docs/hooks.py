"""For MkDocs: linked programs and data, and formulas that need no script.

On GitHub a page reaches `examples/resume.py` as `../examples/resume.py`. Here each such
file becomes a part of the site: a program or a notebook a page that shows it, any other
file itself.
Formulas become MathML, which browsers draw by themselves, so nothing is fetched. On a
phone, code in a sentence breaks where a name ends, not within it.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
FORMULA = re.compile(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]]', re.S)
CODE = re.compile(r"(<pre.*?</pre>)|<code>([^<]{20,})</code>", re.S)
SIGN = re.compile(r"[./(,=]+(?=[^./(,=])")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def _target(path: str) -> str:
    """Return what the site calls a file of the project."""
    return f"{path}.md" if path.endswith((".py", ".ipynb")) else path


def on_config(config: Any) -> Any:
    """Say at the bottom of each page of which version it is."""
    text = (ROOT / "keras_rmsprop" / "__init__.py").read_text()
    [version] = re.findall(r'__version__ = "(.*)"', text)
    config.copyright = f"keras_rmsprop {version}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to."""
    linked = set()
    for file in files.documentation_pages():
        linked |= set(LINK.findall(file.content_string))
    for path in sorted(linked):
        source = ROOT / path
        if not source.is_file():
            continue  # MkDocs says which link leads nowhere
        given: dict[str, Any] = {"abs_src_path": str(source)}
        if path.endswith(".py"):
            text = source.read_text()
            given = {"content": f"{NOT_SEARCHED}# {path}\n\n````python\n{text}````\n"}
        elif path.endswith(".ipynb"):
            given = {"content": NOT_SEARCHED + _shown(json.loads(source.read_text()))}
        elif path.endswith(".md"):
            text = source.read_text().replace("](docs/", "](")
            given = {"content": NOT_SEARCHED + text}
        files.append(
            File.generated(
                config, _target(path), inclusion=InclusionLevel.NOT_IN_NAV, **given
            )
        )
    return files


def _shown(notebook: Any) -> str:
    """Return a stored notebook as a page: text, code, and its outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{source}\n```" if code else source)
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                parts.append(
                    f"![Output](data:image/png;base64,{''.join(picture.split())})"
                )
            elif "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at these files."""
    return LINK.sub(lambda match: f"]({_target(match[1])}", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, and let long code in a sentence break after a sign."""
    return CODE.sub(_breakable, FORMULA.sub(_mathml, html))


def _breakable(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    text = SIGN.sub(r"\g<0><wbr>", match[2])
    return f"<code>{text}</code>"


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    tex = html.unescape(match[3]).replace("{aligned}", "{align*}")
    return match[1] + convert(tex, display=display)
