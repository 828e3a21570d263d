"""The rules of the house that a machine can check: packaging, sizes, names, who may print and read the environment."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "docs", "examples", "build", "dist"}
MAX_LINES = 500
FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|misc|helpers?|common|v\d+|new|old|tmp)(_|$)")
KERNEL_IMPORTS = {"torch", "triton", "numpy"}
KERNEL_VENDOR_IMPORTS = {"xformers", "flash_attn"}


@cache
def source_files() -> tuple[Path, ...]:
    """Python files git tracks or would track, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [Path(p) for p in listed.stdout.split("\0") if p]
    else:  # an unpacked archive, without git
        paths = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    return tuple(sorted(p for p in paths if (ROOT / p).exists() and not p.parts[0].startswith(".")))


def package_files() -> list[Path]:
    return [p for p in source_files() if p.parts[0] not in NOT_SHIPPED]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def test_the_packages_list_equals_the_tree():
    """A package left out of the list is missing in the wheel and nowhere else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(("stepfuse", *p.parent.parts)) for p in package_files() if p.name == "__init__.py"}
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {"stepfuse": "."}
    assert settings["include-package-data"] is False


def test_every_module_is_in_a_package():
    folders = {p.parent for p in package_files()}
    assert sorted(str(f) for f in folders if not (ROOT / f / "__init__.py").exists()) == []


def test_nothing_that_breaks_imports_from_a_checkout():
    assert not (ROOT / "conftest.py").exists(), "a conftest.py at the root would ship in the wheel"
    assert not (ROOT / "setup.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_file_sizes_and_names(path: Path):
    lines = (ROOT / path).read_text().count("\n")
    assert lines <= MAX_LINES, f"{path} has {lines} lines; {MAX_LINES} is the limit: split it by noun"
    bad = [part for part in (*path.parent.parts, path.stem) if FORBIDDEN_NAMES.search(part)]
    assert not bad, f"{path}: {bad[0]!r} names no noun; say what the file is about"


def test_only_the_command_line_prints():
    speakers = ("cli.py", "doctor.py")
    loud = [
        f"{path}:{node.lineno}"
        for path in package_files()
        if path.name not in speakers and not _is_script(path)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert loud == [], "use the logger `stepfuse`, or return the text to the command line"


def _is_script(path: Path) -> bool:
    """A module of benchmarks that is run as `python -m ...` may print."""
    return path.parts[0] == "benchmarks" and '__name__ == "__main__"' in (ROOT / path).read_text()


def test_only_env_reads_the_environment():
    readers = [
        f"{path}:{node.lineno}"
        for path in package_files()
        if path.as_posix() != "engine/env.py"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and _imports(node) & {"environ", "getenv"})
    ]
    assert readers == [], "environment variables are read in engine/env.py only, with a type and a default"


def test_except_exception_is_rare():
    """A broad except hides the error it did not expect. The named boundaries say `# boundary:` and why."""
    broad = []
    for path in package_files():
        lines = (ROOT / path).read_text().splitlines()
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
            last = node.body[-1]
            raised_again = isinstance(last, ast.Raise) and last.exc is None
            named = "# boundary:" in lines[node.lineno - 1]
            if caught & {"Exception", "BaseException"} and not (raised_again or named):
                broad.append(f"{path}:{node.lineno}")
    assert broad == []


def test_imports_inside_the_package_are_relative():
    absolute = [
        f"{path}:{node.lineno}"
        for path in package_files()
        for node in ast.walk(tree(path))
        if any(name.split(".")[0] == "stepfuse" for name in _absolute_imports(node))
    ]
    assert absolute == []


def test_kernels_import_torch_triton_numpy_and_the_standard_library_only():
    allowed = KERNEL_IMPORTS | set(sys.stdlib_module_names)
    foreign = [
        f"{path}:{node.lineno} {name}"
        for path in package_files()
        if path.parts[0] == "kernels"
        for node in ast.walk(tree(path))
        for name in _absolute_imports(node)
        if name.split(".")[0] not in allowed | (KERNEL_VENDOR_IMPORTS if path.name == "vendor.py" else set())
    ]
    assert foreign == []


def test_ops_do_not_import_each_other():
    ops = {p.parts[1] for p in package_files() if p.parts[0] == "kernels" and len(p.parts) == 3}
    crossing = []
    for path in (p for p in package_files() if p.parts[0] == "kernels" and len(p.parts) == 3):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                targets = {node.module.split(".")[0]} if node.module else _imports(node)
                crossing += [f"{path}:{node.lineno} {t}" for t in targets & ops]
    assert crossing == [], "shared pieces live in kernels/tile.py"


def _imports(node: ast.Import | ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


def _absolute_imports(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return _imports(node)
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module}
    return set()


def test_architecture_names_things_that_exist():
    """Every `path` and `path:name` in docs/architecture.md is in the tree, as a file and as a definition in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|txt))(?::([\w.]+))?`", text)
    assert len(named) >= 20, "the page names the function of each step"
    wrong = []
    for path, name in named:
        if not (ROOT / path).exists():
            wrong.append(path)
        elif name and not _defines(tree(Path(path)), name.split(".")):
            wrong.append(f"{path}:{name}")
    assert wrong == []


def _defines(scope: ast.AST, names: list[str]) -> bool:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == names[0]:
            return len(names) == 1 or _defines(node, names[1:])
        if isinstance(node, ast.Assign | ast.AnnAssign) and len(names) == 1:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == names[0] for t in targets):
                return True
    return False


def test_links_between_pages_resolve():
    broken = []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_readme_opens_with_the_two_commands():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (kind1, install), (kind2, generate) = blocks[:2]
    assert kind1 == kind2 == "bash"
    assert "-m venv" in install
    assert "-c constraints.txt" in install
    assert "generate" in generate
    assert len(install.splitlines()) == len(generate.splitlines()) == 1


def test_no_machine_of_ours_is_named():
    """Paths of somebody's machine mean nothing to a reader."""
    paths = re.compile(r"(?<![\w.~])/(?:work|home|root|tmp|mnt|Users|opt)/\w+")
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ""}
    found = []
    for file in (*source_files(), *(p.relative_to(ROOT) for p in (*ROOT.glob("*"), *(ROOT / "docs").rglob("*")))):
        full = ROOT / file
        if full.is_file() and full.suffix in suffixes and file.parts[0] != "tests":
            found += [f"{file}: {match}" for match in paths.findall(full.read_text(errors="ignore"))]
    assert found == []


def test_built_in_models_stay_small():
    files = [p for p in (ROOT / "engine" / "builtin").rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files), "no built-in model"
    assert max(p.stat().st_size for p in files) <= 15 * 2**20
    assert sum(p.stat().st_size for p in files) <= 32 * 2**20
