"""The pages: their code runs, their links lead somewhere, and the API page is whole."""

import ast
import doctest
import importlib
import inspect
import json
import re
import runpy
from pathlib import Path

import keras
import public_api
import pytest
from stepping import python

import keras_rmsprop
from keras_rmsprop import callbacks, dialects, transfer

pytestmark = pytest.mark.tensorflow("pages that show code for it")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
BLOCK = re.compile(
    r"^(?P<indent> *)"
    r"(?:<!-- (?:not run: (?P<reason>[^\n]+)|on: (?P<backends>[^\n]+)) -->\n+ *)?"
    r"```python\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page, backend=None):
    """Return for each block of Python: its line, its code, and why it is not run.

    With a backend, return the blocks that are for it; without, the others.
    """
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        backends = (match["backends"] or "").split(", ")
        if (backend or "") not in backends:
            continue
        line = text[: match.start("code")].count("\n")
        indent = len(match["indent"])
        code = "".join(x[indent:] or "\n" for x in match["code"].splitlines(True))
        found.append((line, code, match["reason"]))
    return found


def run(page, line, code, names):
    """Run a block with the names of the blocks before it; check outputs, if any."""
    if not code.startswith(">>>"):
        exec(compile("\n" * line + code, str(page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), line)
    test.globs = names
    results = doctest.DocTestRunner().run(test, clear_globs=False)
    assert results.attempted
    assert results.failed == 0


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if "docs" in page.parts else [])
        for page in PAGES
    ],
    ids=lambda page: page.name,
)
def test_code_runs_and_outputs_are_true(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code, reason in blocks(page):
        if not reason:
            run(page, line, code, names)


@pytest.mark.peers
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_code_runs_on_its_backends(backend, tmp_path):
    pytest.importorskip(backend)
    for page in PAGES:
        code = "".join(code for _, code, _ in blocks(page, backend))
        if "MultiOptimizer" in code and not hasattr(keras.optimizers, "MultiOptimizer"):
            continue  # Keras has it since 3.15
        python(
            code,
            cwd=tmp_path,
            KERAS_BACKEND=backend,
            PYTHONPATH=str(ROOT),
            XLA_FLAGS="--xla_force_host_platform_device_count=8",
        )


def test_most_code_is_run():
    found = [match for page in PAGES for match in BLOCK.finditer(page.read_text())]
    assert len([match for match in found if match["reason"]]) < len(found) / 10
    fences = sum(page.read_text().count("```python\n") for page in PAGES)
    assert len(found) == fences


def anchors(page):
    """Return the anchors of a page's headings, and of what it shows of the API."""
    found = {*re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(re.sub(r"\s+", "-", words))
    return found


@every_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@every_page
def test_make_has_what_it_is_told_to_make(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(), re.M))
    assert named <= targets


def test_all_is_said_in_few_words():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]
    # As `cat README.md CHANGELOG.md docs/*.md | wc -w` counts.
    assert sum(len(page.read_bytes().split()) for page in pages) <= 16_000
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@every_page
def test_terms_are_those_of_the_field(page):
    text = " ".join(page.read_text().split())
    odd = r"silent row|slots in bytes|laid end to end|to the bit|\banew\b|\bmended\b"
    assert re.findall(odd, text) == []


def test_workflows_call_targets():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for workflow in ROOT.glob(".github/workflows/*.yml"):
        text = workflow.read_text()
        named = re.findall(r"run: make ([a-z-]+)", text)
        for matrix in re.findall(r"target: \[(.*)\]", text):
            named += matrix.split(", ")
        assert named
        assert {*named} <= targets, workflow


def test_the_tests_that_are_named_exist():
    text = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    there = {p.stem for p in (ROOT / "tests").glob("test_*.py")}
    there |= set(re.findall(r"^ *def (test_\w+)", text, re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= there, page


def test_every_page_is_in_the_navigation():
    # Read as text, for these tests need no MkDocs.
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    named = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(p.name for p in ROOT.glob("docs/*.md"))


def public_names():
    """Return what users may import, by its full name."""
    names = {
        f"keras_rmsprop.{name}"
        for name in keras_rmsprop.__all__
        if not inspect.ismodule(getattr(keras_rmsprop, name))
    }
    for module in (callbacks, dialects, transfer):
        again = {
            alias.name
            for node in ast.parse(inspect.getsource(module)).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname == alias.name  # `import X as X`: for others to import
        }
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if not name.startswith("_") and (own or name.isupper() or name in again):
                names.add(f"{module.__name__}.{name}")
    return names


def test_the_api_page_is_whole():
    page = (ROOT / "docs/api.md").read_text()
    shown = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(shown) == len({*shown})
    assert public_names() - {*shown} == set()
    for name in shown:
        owner, _, last = name.rpartition(".")
        assert hasattr(inspect.importlib.import_module(owner), last), name


def test_the_api_is_the_one_written_down():
    assert public_api.api() == public_api.FILE.read_text(encoding="utf-8"), (
        "The public API has changed. If it should, say so in CHANGELOG.md, and run "
        "`.venv/bin/python tests/public_api.py`"
    )


def test_figures_in_sentences_are_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report, sentences = map(importlib.import_module, ("report", "sentences"))
    parts = report.load(ROOT / "benchmarks/results/bench.json")
    texts = [page.read_text() for page in PAGES]
    assert sum(len(sentences.MARKED.findall(text)) for text in texts) > 10
    assert sum(text.count("<!-- figure ") for text in texts) == sum(
        len(sentences.MARKED.findall(text)) for text in texts
    )
    for text in texts:
        assert sentences.filled(text, parts) == text
        assert not re.search("^ *<!-- figure ", text, re.MULTILINE)  # ends a paragraph
    with pytest.raises(KeyError):
        sentences.filled("<!-- figure fit: nobody -->1<!-- end figure -->", parts)


def test_tables_and_verdicts_are_those_of_make_tuning(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("tuning_report")
    results = json.loads((ROOT / "benchmarks/results/tuning.json").read_text())
    pages = [page.read_text() for page in report.PAGES]
    for page in pages:
        assert report.filled(page, results) == page
    everything = "".join(pages)
    assert everything.count("<!-- figure tuning: ") >= 5
    assert report.markdown(results["table"]) in everything
    for sentence in results["verdicts"] + results["ranking"]:
        assert f"- {sentence}\n" in everything


def test_the_decades_are_those_of_make_tune():
    page = (ROOT / "docs/choosing.md").read_text().split("`make tune`")[1]
    results = (ROOT / "benchmarks/results/sensitivity.md").read_text()
    decades = dict(re.findall(r"^([a-zA-Z ]+): ([\d.]+) of", results, re.MULTILINE))
    shown = [decades[name] for name in ("plain", "EMA", "linear decay", "auto")]
    assert re.findall(r"\b\d\.\d\b", page) == shown


def test_the_tables_of_make_bench_are_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    tables = report.tables(report.load(ROOT / "benchmarks/results/bench.json"))
    page = (ROOT / "docs/benchmarks.md").read_text()
    everything = (ROOT / "benchmarks/results/bench.md").read_text()
    for title in report.SHOWN.values():
        assert report.markdown({"": tables[title]}) in page
    assert report.markdown(tables) in everything


def test_the_picture_of_the_pipeline_is_that_of_the_code():
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_pipeline.py"))
    assert (ROOT / "docs" / "pipeline.svg").read_text() == drawing["drawn"]()


def test_the_page_of_gpus_is_filled_with_what_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    page = (ROOT / "docs" / gpu.PAGE).read_text()
    figure = {"who": "jax: this", "what": "1 M", "how": "64 M copied"}
    figure["values"] = {"update": [1.0, 1.5, 2.0], "copy": [1.0]}
    measured = {"1 M": {"machine": {"gpu": "A"}, "figures": [figure]}}
    filled = gpu.filled(page, measured)
    assert "gpu A\n\n|  | jax: this |\n| :-- | --: |\n| 1 M | 1.5 (1-2) |\n" in filled
    assert gpu.filled(filled, measured) == filled
    table = filled.partition(gpu.BEGIN)[2].partition(gpu.report.END)[0]
    kept = page.partition(gpu.BEGIN)[2].partition(gpu.report.END)[0]
    assert filled.replace(table, kept) == page
