"""The rules of the house, read from the syntax trees of the package."""

import ast
import inspect
from pathlib import Path

import keras
import pytest

import keras_rmsprop

PACKAGE = Path(keras_rmsprop.__file__).parent
MODULES = {
    ".".join(["keras_rmsprop", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def own(name):
    """Return the module of the package that a dotted name is, or is in."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate in MODULES:
            return candidate
    return None


def imports(name):
    """Return the modules that one imports, of the package and of others."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                f"{node.module}.{alias.name}"
                if own(f"{node.module}.{alias.name}") not in (None, own(node.module))
                else node.module
                for alias in node.names
            }
    return found


ARROWS = {name: {own(n) for n in imports(name)} - {None, name} for name in TREES}


def test_imports_run_one_way():
    order, left = [], dict(ARROWS)
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        order += free
        left = {name: used for name, used in left.items() if name not in free}
    assert order[-1] == "keras_rmsprop.__init__"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("rule", set()),
        ("checks", set()),
        ("folding", set()),
        ("slots", set()),
        ("bits", set()),
        ("blockwise", {"bits"}),
        ("codecs", {"bits", "blockwise", "rule"}),
        ("options", {"checks"}),
        ("alignment", set()),
        ("ema_share", {"rule"}),
        ("update", {"codecs", "ema_share", "rule"}),
        ("hooks", {"update"}),
        ("skipping", {"folding"}),
        ("backends.base", {"rule", "skipping", "update"}),
        ("kernel.files", set()),
        ("kernel.build", {"kernel.files"}),
        ("kernel.__init__", {"kernel.build", "kernel.files"}),
        (
            "kernel.torch",
            {"kernel.__init__", "kernel.build", "blockwise", "rule", "update"},
        ),
    ],
)
def test_the_lower_rooms_know_little(name, allowed):
    used = ARROWS[f"keras_rmsprop.{name}"]
    assert used <= {f"keras_rmsprop.{n}" for n in allowed}


def test_the_kernel_knows_no_backend():
    of_kernel = [name for name in ARROWS if name.startswith("keras_rmsprop.kernel.")]
    assert not [name for name in of_kernel if "backends" in " ".join(ARROWS[name])]


def test_only_the_rooms_of_tensorflow_import_it():
    users = {
        name.removeprefix("keras_rmsprop.")
        for name in TREES
        if "tensorflow" in imports(name)
    }
    assert users == {
        "access",
        "row_sums",
        "averages",  # under that backend only
        "bits",  # as Keras' own fails for some shapes
        "catching_up",
        "clocks",
        "estimate",  # under that backend only
        "monitoring",  # to write for TensorBoard
        "sparse",
        "transfer",  # to read checkpoints of TensorFlow 1
        "backends.layouts",
        "backends.programs",
        "backends.replay",
        "backends.tensorflow",
        "backends.updating",
        "row_averages",
        "kernel.rows",
        "kernel.tensorflow",
    }


MOST_LINES, MOST_LINES_OF_CODE = 450, 300


def lines_of_code(source):
    """Return how many lines have code: no comment, docstring or blank."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            skipped |= {*range(node.lineno, node.end_lineno + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and n not in skipped
        for n, line in enumerate(source.splitlines(), 1)
    )


@pytest.mark.parametrize("name", MODULES)
def test_a_room_can_be_read_at_once(name):
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert lines_of_code(source) <= MOST_LINES_OF_CODE


def test_no_method_of_the_optimizer_leaves_something_for_another():
    """But in `__init__`, `build` and property setters."""
    [optimizer] = [
        node
        for node in TREES["keras_rmsprop.optimizer"].body
        if isinstance(node, ast.ClassDef)
    ]
    for method in optimizer.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        is_setter = any(
            isinstance(d, ast.Attribute) and d.attr == "setter"
            for d in method.decorator_list
        )
        if method.name not in ("__init__", "build", "_build") and not is_setter:
            assert not attributes_of_self(method, ast.Store), method.name
    text = MODULES["keras_rmsprop.stepping"].read_text()
    [steps] = [n for n in ast.parse(text).body if getattr(n, "name", "") == "Steps"]
    for method in steps.body:
        if isinstance(method, ast.FunctionDef) and method.name != "__init__":
            assert not attributes_of_self(method, ast.Store), method.name


def test_product_code_does_not_import_the_oracle():
    assert not [n for n, used in ARROWS.items() if "keras_rmsprop.reference" in used]


def test_transfer_and_dialects_use_the_optimizers_public_face():
    for name in ("callbacks", "dialects", "mapping"):
        tree = TREES[f"keras_rmsprop.{name}"]
        private = [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and node.attr not in ("_replace", "_fields", "_getframe")
            and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        ]
        assert not private, name


def classes():
    return {
        node.name: node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def attributes_of_self(node, context):
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
        and isinstance(n.ctx, context)
    }


def defined(node):
    """Return what a class defines: methods, attributes, and what it sets on itself."""
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            names.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            targets = statement.targets[0]
            names |= {n.id for n in ast.walk(targets) if isinstance(n, ast.Name)}
    return names | attributes_of_self(node, ast.Store)


def test_no_class_uses_what_only_its_subclasses_define():
    found = classes()
    bases = {
        name: [b.id for b in node.bases if isinstance(b, ast.Name) and b.id in found]
        for name, node in found.items()
    }
    for name, node in found.items():
        below = {
            attribute
            for other, others_bases in bases.items()
            if name in others_bases
            for attribute in defined(found[other])
        }
        above = set().union(*(defined(found[base]) for base in bases[name]))
        mine = defined(node) | above
        used = attributes_of_self(node, ast.Load)
        assert not (used & below) - mine, name


def test_there_is_one_subclass_of_keras_optimizer():
    subclasses = [
        c
        for name in MODULES
        if name.startswith("keras_rmsprop")
        and not name.endswith(("__init__", ".torch"))  # torch may be missing
        for c in vars(inspect.importlib.import_module(name)).values()
        if inspect.isclass(c)
        and issubclass(c, keras.optimizers.Optimizer)
        and c.__module__.startswith("keras_rmsprop")
    ]
    assert {*subclasses} == {keras_rmsprop.RMSprop}
    assert keras_rmsprop.RMSprop.__bases__ == (keras.optimizers.Optimizer,)


def test_how_a_slot_is_kept_is_known_in_one_room():
    for name, tree in TREES.items():
        if name.endswith((".bits", ".codecs", ".options")):
            continue
        words = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare)
            for node in [*node.comparators, node.left]
            if isinstance(node, ast.Constant)
        ]
        # `state.as_array` has to tell NumPy, which does not know it.
        assert "bfloat16" not in words or name.endswith(".state")
