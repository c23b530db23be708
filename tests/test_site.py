"""The site, opened from the disk with a browser and without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_a_browser = pytest.mark.skipif(not BROWSER, reason="There is no Chromium here")
WORDS = {
    "gradient clipping": "instability",
    "exponential moving average": "averaging",
    "weight averaging": "averaging",
    "EMA": "averaging",
    "weight decay": "parameters",
    "warm-up": "instability",
    "learning rate finder": "choosing",
    "automatic learning rate": "learning_rate",
    "8-bit": "memory",
    "stochastic rounding": "memory",
    "momentum": "parameters",
    "epsilon": "parameters",
    "mixed precision": "instability",
    "NaN": "instability",
    "embedding": "embeddings",
    "LoRA": "fine_tuning",
    "unfreeze": "fine_tuning",
    "resume": "saving",
    "native kernel": "custom_loops",
    "PyTorch": "backends",
    "TensorBoard": "callbacks",
    "batch normalization": "averaging",
    "subclass": "subclassing",
    "MirroredStrategy": "distributed",
}
"""What somebody looks for, and the page that should come first."""
SEARCH = """
  for (const word of given) {
    const page = await opened("index.html?q=" + encodeURIComponent(word), 1280);
    const link = await seen(() => page.querySelector(".md-search-result__link"));
    found.push(link && link.getAttribute("href").split("/").pop().split(/[.?]/)[0]);
  }
"""
WIDTHS = """
  for (const [name, width] of given) {
    const page = await opened(name, width);
    const wide = [page.scrollingElement];
    if (width > 1000) wide.push(...page.querySelectorAll(".md-typeset__scrollwrap"));
    for (const x of wide) {
      const over = x.scrollWidth - x.clientWidth;
      if (over > 1) found.push([name, width, over, x.textContent.trim().slice(0, 40)]);
    }
  }
"""
HARNESS = """<pre></pre><script>
const given = GIVEN, found = [];
let frame;
async function opened(name, width) {
  frame?.remove();
  frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px`;
  frame.src = name;
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  return frame.contentDocument;
}
async function seen(what) {
  for (let i = 0; i < 200 && !what(); i++) await new Promise((r) => setTimeout(r, 20));
  return what();
}
(async () => {
  BODY
  document.querySelector("pre").textContent = "<" + JSON.stringify(found) + ">";
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="There is no MkDocs here: `make docs`")
    pytest.importorskip("latex2mathml")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", folder]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environ)
    return folder


def pages(site):
    """Return the pages, without those that show a program."""
    names = [page.stem for page in sorted((ROOT / "docs").glob("*.md"))]
    return [site / f"{name}.html" for name in names]


def browsed(site, body, given):
    """Return what a script finds in the pages, in a browser without a network."""
    page = site / "harness.html"
    page.write_text(HARNESS.replace("GIVEN", json.dumps(given)).replace("BODY", body))
    options = "--headless=new --no-sandbox --disable-gpu --disable-web-security"
    options += " --allow-file-access-from-files --virtual-time-budget=600000"
    command = [BROWSER, *options.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={site}/.profile", "--dump-dom", page.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    page.unlink()
    [found] = re.findall(r"<pre>&lt;(.*)&gt;</pre>", out)
    return json.loads(found.replace("&lt;", "<").replace("&gt;", ">"))


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]*)", text)
        loaded += re.findall(
            r"<link[^>]* rel=\"stylesheet\"[^>]* href=\"([^\"]*)", text
        )
        assert loaded
        assert not [url for url in loaded if re.match("(https?:)?//", url)], page


def test_formulas_are_mathml(site):
    formulas = 0
    for page in pages(site):
        text = page.read_text()
        formulas += text.count("<math ")
        assert text.count("<math ") == text.count('class="arithmatex"'), page
        assert not re.search(r"<math [^>]*>(?:(?!</math>).)*[\\&](?!#)", text), page
    assert formulas > 100


def test_programs_are_not_searched(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {re.split("[#?]", entry["location"])[0] for entry in index["docs"]}
    assert found <= {page.name for page in pages(site)} | {""}
    assert (site / "examples/resume.py.html").exists()


@in_a_browser
def test_the_search_finds_the_page(site):
    found = browsed(site, SEARCH, [*WORDS])
    assert dict(zip(WORDS, found, strict=True)) == WORDS


@in_a_browser
def test_nothing_is_too_wide(site):
    names = [page.name for page in pages(site)]
    given = [(name, width) for width in (400, 1280) for name in names]
    assert browsed(site, WIDTHS, given) == []
