"""What every Triton kernel needs on every architecture, from the compiler alone: no GPU is used.

    python -m stepfuse.benchmarks.resources --check              compare with the committed table
    python -m stepfuse.benchmarks.resources --write              rewrite the table and docs/kernels/resources.md
    python -m stepfuse.benchmarks.resources --check --op geglu   one op only

Compiles all `compilations()` of kernels/*/kernel*.py with the Triton that Python finds. The table keeps one column per
compiler version: registers and stack per thread, shared memory per block, bytes of machine code. A stack that grows
means that values no longer fit in registers (spills), and such a kernel is slow in a way that no test of values sees.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "data" / "kernel_resources.json"
PAGE = ROOT / "docs" / "kernels" / "resources.md"

SHARED_LIMITS = {  # bytes one block may have: CUDA programming guide, table of technical specifications; CDNA3 ISA
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
REGISTER_SLACK = 1.05
CODE_SHARE = 0.45
"""Machine code below this share of the same kernel's on other CUDA architectures (median), or of the table's, is not
the kernel: a compiler can end without an error and leave an empty one. Between real ones 0.54 was the least (sm_90 with
half of sm_100's code); an empty kernel has 2.7 KB (sm_80) to 5.3 KB (sm_100)."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: registers and stack bytes a thread, shared bytes a block, bytes of code."""

    registers: int
    stack: int
    shared: int
    code: int

    def row(self) -> list[int]:
        return [self.registers, self.stack, self.shared, self.code]


Table = Mapping[str, Mapping[str, Resources]]
"""Kernel ("geglu.kernel: bf16, 8192 x 1280") -> architecture -> Resources."""


def modules(op: str | None = None) -> list[str]:
    """Names of the kernel modules, "geglu.kernel", of one op or of all."""
    files = sorted((ROOT / "kernels").glob(f"{op or '*'}/kernel*.py"))
    if not files:
        raise ValueError(f"no kernels of {op!r}; ops with kernels: {', '.join(m.split('.')[0] for m in modules())}")
    return [f"{file.parent.name}.{file.stem}" for file in files]


def entries(module: str) -> list[Any]:
    """The compilations of a module. Raises ValueError for two of one name or an architecture that is not listed."""
    found = import_module(f"..kernels.{module}", __package__).compilations()
    names = [c.name for c in found]
    if len(set(names)) != len(names):
        raise ValueError(f"{module}: names of compilations must differ, got {sorted(names)}")
    if unknown := {target for c in found for target in c.targets} - set(SHARED_LIMITS):
        raise ValueError(f"{module}: no architecture {', '.join(unknown)}; valid: {', '.join(SHARED_LIMITS)}")
    return found


def compile_entry(place: tuple[str, int]) -> tuple[str, dict[str, Resources]]:
    """Name and resources of the n-th compilation of a module, for every architecture that launches it."""
    module, index = place
    compilation = entries(module)[index]
    wanted = compilation.targets or SHARED_LIMITS
    return f"{module}: {compilation.name}", {t: compile_for(compilation, t) for t in SHARED_LIMITS if t in wanted}


def compile_for(compilation: Any, target: str) -> Resources:
    """Compile one entry for one architecture with the constants and options of real launches."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.disable_line_info = True  # or the size of the code depends on where the checkout lies
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    names = compilation.kernel.arg_names
    if missing := set(names) - set(compilation.signature) - set(compilation.constants):
        raise ValueError(f"{compilation.name}: neither type nor constant for arguments {sorted(missing)}")
    source = ASTSource(
        compilation.kernel,
        {name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    try:
        compiled = triton.compile(source, target=gpu, options=compilation.options.kwargs())
    except Exception as error:
        error.add_note(f"while compiling {compilation.name!r} for {target}")
        raise
    if amd:
        return _read_amdgcn(compiled.asm["amdgcn"], len(compiled.asm["hsaco"]))
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, shared: int) -> Resources:
    """Resources of a cubin by Triton's own cuobjdump.

    Shared memory is dynamic, so only Triton's metadata knows it; what cuobjdump calls SHARED is the driver's 1 KB.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not usage:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack = (max(int(value) for value in column) for column in zip(*usage, strict=True))
    return Resources(registers, stack, shared, len(cubin))


def _read_amdgcn(text: str, code: int) -> Resources:
    """Resources from the metadata at the end of AMD assembly; registers are vector registers."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(found.group(1))

    return Resources(value("vgpr_count"), value("private_segment_fixed_size"), value("group_segment_fixed_size"), code)


def measure(op: str | None = None, jobs: int = 1) -> Table:
    """Resources of all kernels (or one op's) under the installed Triton, in `jobs` processes."""
    places = [(module, index) for module in modules(op) for index in range(len(entries(module)))]
    if jobs == 1:
        return dict(sorted(map(compile_entry, places)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return dict(sorted(pool.map(compile_entry, places, chunksize=4)))


def _table(rows: Mapping[str, Mapping[str, Iterable[int]]]) -> Table:
    return {
        name: {target: Resources(*row) for target, row in targets.items()} for name, targets in sorted(rows.items())
    }


def read_table(version: str, path: Path = TABLE) -> Table:
    """The committed resources under one compiler version; KeyError names the versions there are."""
    versions = json.loads(path.read_text())
    if version not in versions:
        raise KeyError(f"no table for Triton {version}; there are {', '.join(versions)}: run --write with it")
    return _table(versions[version])


def write_table(version: str, found: Table, op: str | None = None, path: Path = TABLE) -> None:
    """Put `found` into the table's file, one line per kernel; with `op`, other ops' lines stay."""
    versions = json.loads(path.read_text()) if path.exists() else {}
    kept = {n: row for n, row in versions.get(version, {}).items() if op and not n.startswith(f"{op}.")}
    made = {name: {target: r.row() for target, r in targets.items()} for name, targets in found.items()}
    versions[version] = dict(sorted((kept | made).items()))
    blocks = []
    for key, rows in sorted(versions.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        blocks.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def complaints(found: Table, committed: Table) -> Iterator[str]:
    """Why `found` is worse than the committed table, or does not match it; nothing when all is well."""
    for name in sorted(set(found) ^ set(committed)):
        yield f"{name}: {'not in the table' if name in found else 'in the table, but no longer compiled'}"
    for name, targets in found.items():
        for target, now in targets.items():
            if now.shared > SHARED_LIMITS[target]:
                yield f"{name}: {target}: {now.shared} bytes of shared memory, the limit is {SHARED_LIMITS[target]}"
            before = committed.get(name, {}).get(target)
            if before is None:
                if name in committed:
                    yield f"{name}: {target}: not in the table"
                continue
            if now.stack > before.stack:
                yield f"{name}: {target}: {now.stack} bytes of stack (spills), the table has {before.stack}"
            if now.registers > REGISTER_SLACK * before.registers:
                yield f"{name}: {target}: {now.registers} registers, the table has {before.registers}"
            if now.code < CODE_SHARE * before.code:
                yield f"{name}: {target}: {now.code} bytes of code, the table has {before.code}: is it all there?"
    yield from too_small(found)


def too_small(found: Table) -> Iterator[str]:
    """Kernels with suspiciously little machine code on an architecture, against the others of the same maker."""
    for name, targets in found.items():
        sizes = {target: r.code for target, r in targets.items() if target.startswith("sm_")}
        for target, code in sizes.items():
            others = [size for other, size in sizes.items() if other != target]
            if others and code < CODE_SHARE * (usual := median(others)):
                yield f"{name}: {target}: {code} bytes of code, other architectures have {usual:.0f}: is it all there?"


def page(path: Path = TABLE) -> str:
    """The committed table as Markdown: the newest compiler in full, others where they differ."""
    versions = {version: read_table(version, path) for version in json.loads(path.read_text())}
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    lines = [
        "# Resources of the Triton kernels",
        "",
        "Written by `python -m stepfuse.benchmarks.resources --write`; do not edit. Cells: registers per thread, stack",
        "bytes per thread where there are any (spills, or the slow path of sin and cos), shared memory per block.",
        "Compiled, not timed: the architectures below need no GPU to be here.",
        "",
        f"## Triton {newest}",
        "",
        f"| kernel | {' | '.join(SHARED_LIMITS)} |",
        f"|---|{'---|' * len(SHARED_LIMITS)}",
    ]
    for name, targets in versions[newest].items():
        cells = [_cell(targets[t]) if t in targets else "" for t in SHARED_LIMITS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for version in sorted(set(versions) - {newest}):
        lines += ["", f"## Triton {version}, where it differs", "", "| kernel | target | cell |", "|---|---|---|"]
        for name, targets in versions[version].items():
            for target, r in targets.items():
                other = versions[newest].get(name, {}).get(target)
                if other is None or _cell(other) != _cell(r):
                    lines.append(f"| {name} | {target} | {_cell(r)} |")
    return "\n".join(lines) + "\n"


def _cell(r: Resources) -> str:
    parts = [
        f"{r.registers} r",
        f"{r.stack} B stack" if r.stack else "",
        f"{r.shared / 1024:.3g} K" if r.shared else "",
    ]
    return ", ".join(part for part in parts if part)


@cache
def compiler() -> str:
    """Version of the installed Triton."""
    import triton

    return triton.__version__


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="resources", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", help="one op only, such as geglu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default 1)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table; 1 when it got worse")
    action.add_argument("--write", action="store_true", help="rewrite the table and its page")
    options = parser.parse_args(arguments)
    found = measure(options.op, options.jobs)
    if options.write:
        if small := list(too_small(found)):
            print("\n".join([*small, "nothing was written: compile again, and look at the code of these kernels"]))
            return 1
        write_table(compiler(), found, options.op)
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page())
        print(f"Triton {compiler()}: {len(found)} kernels written to {TABLE.relative_to(ROOT)}")
        return 0
    committed = read_table(compiler())
    committed = {name: row for name, row in committed.items() if not options.op or name.startswith(f"{options.op}.")}
    worse = list(complaints(found, committed))
    print(f"Triton {compiler()}: {len(found)} kernels, {len(worse)} complaints")
    for line in worse:
        print(line)
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
