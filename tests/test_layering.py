"""Who may import whom, and what must not be imported before it is needed: read from the source, and run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import factories as make
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "loratools"
BOTTOM = {"errors", "tensors", "model", "registry"}
LIBRARIES = {"torch", "numpy", "scipy", "safetensors", "click", "rich"}

# What each room may import of loratools, anywhere in it; and of libraries at top level.
MAY: dict[str, set[str]] = {
    "errors": set(),
    "tensors": {"errors"},
    "model": {"errors", "tensors", "kinds"},  # kinds inside Module.delta() alone
    "registry": {"errors"},
    "io": {"errors", "tensors"},
    "archs": {"errors", "model", "registry"},
    "runtimes": {"errors", "registry"},
    "kinds": {"errors", "model", "tensors", "registry", "maths"},
    "formats": BOTTOM | {"io", "archs", "kinds"},
    "maths": {"errors"},
    "methods": {"errors", "maths", "registry"},
    "engine": {"errors", "tensors", "io", "__version__"},
    "ops": BOTTOM
    | {"io", "archs", "kinds", "formats", "maths", "methods", "engine", "runtimes", "__version__"},
    "report": {"model", "errors", "ops"},
    "cli": {
        "errors",
        "registry",
        "ops",
        "engine",
        "report",
        "formats",
        "methods",
        "archs",
        "runtimes",
        "__version__",
    },
    "__init__": {"errors", "model", "ops"},
    "__main__": {"cli"},
}
LIBRARIES_AT_TOP: dict[str, set[str]] = {
    **{room: set() for room in MAY},
    "maths": {"torch", "numpy", "scipy"},
    "methods": {"torch"},
    "engine": {"torch", "numpy"},
    "ops": {"torch", "numpy"},
    "report": {"rich"},
    "cli": {"click"},
}
# Operations that a header alone must suffice for.
HEADER_OPS = {"inspect", "files", "results", "_metadata", "_outputs"}
# Operations that copy bits, and compute only where something has to be computed.
TORCH_FREE_OPS = {
    "convert",
    "_convert_report",
    "_convert_stages",
    "bake",
    "verify",
    "checkpoint_results",
    "prediction_results",
    "base_names",
    "_arch_of",
    "_bake_identity",
    "_bake_output",
    "_bake_plan",
    "_bake_records",
    "_bake_run",
    "_bake_shards",
    "_bake_write",
    "_changes",
    "_experts",
    "_initial",
    "_moe",
    "_moe_base",
    "_moe_convert",
    "_moe_known",
    "_moe_norms",
    "_moe_open",
    "_moe_parts",
    "_moe_single",
    "_moe_told",
    "_identify",
    "_locate",
    "_network",
    "_pieces",
    "_places",
    "_quantised",
    "_replaced",
    "_terms",
    "_strengths",
    "_tied",
    "_tied_names",
    "_tied_uses",
    "_unet_depth",
    "_unplaced",
    "_verify_tasks",
    "_base_match",
    "_base_parts",
    "_bits",
    "_cut",
    "_fit",
    "_fuse",
    "_host",
    "_ledger",
    "_projections",
    "_normal",
    "_normal_config",
    "_normal_form",
    "_normal_partners",
    "_normal_steps",
    "_normal_whole",
    "_one_alpha",
    "_prove",
    "_reread",
    "_regroup",
    "_remarks",
    "_row_orders",
    "_rows",
    "_scale",
    "_settle",
    "_split",
    "_weights_of",
    "_pack_fields",
    "_pack_files",
    "_pack_fit",
    "_pack_index",
    "_pack_inputs",
    "_pack_slots",
    "pack_results",
    "doctor",
    "doctor_results",
    "_doctor_base",
    "_doctor_case",
    "_doctor_config",
    "_doctor_features",
    "_doctor_fields",
    "_doctor_keys",
    "_doctor_mend",
    "_doctor_odd",
    "_doctor_runtime",
    "_doctor_scale",
    "_doctor_values",
    "_extras_config",
    "_extras_words",
    "_fused_rows",
    "_tokens",
}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported dotted name that runs, and whether it does so at top level."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only: set[ast.AST] = set()
    nested: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(child for statement in node.body for child in ast.walk(statement))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nested.update(ast.walk(node))
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in nested) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                found.append((f"{base}.{alias.name}" if base == "loratools" else base, node not in nested))
    return found


def _ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", _modules(), ids=_ids)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    room = _room(path)
    assert room in MAY, f"{room} has no row in the table"
    for name, _ in _imports(path):
        if name == "loratools" or name.startswith("loratools."):
            imported = name.split(".")[1] if "." in name else ""
            assert imported == room or imported in MAY[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", _modules(), ids=_ids)
def test_libraries_are_imported_at_top_level_only_where_they_are_at_home(path: Path) -> None:
    room = _room(path)
    allowed = LIBRARIES_AT_TOP[room]
    if room == "ops" and path.stem in HEADER_OPS | TORCH_FREE_OPS:
        allowed = {"numpy"} if path.stem in TORCH_FREE_OPS else set()
    top = {name.split(".")[0] for name, at_top in _imports(path) if at_top}
    assert not (top & LIBRARIES) - allowed
    if room in ("archs", "formats", "report"):
        anywhere = {name.split(".")[0] for name, _ in _imports(path)}
        assert "torch" not in anywhere
    if room == "ops":
        assert not {"click", "rich"} & {name.split(".")[0] for name, _ in _imports(path)}


def test_reports_see_results_and_nothing_else_of_operations() -> None:
    for path in _modules():
        if _room(path) == "report":
            operations = {name for name, _ in _imports(path) if name.startswith("loratools.ops")}
            assert operations <= {"loratools.ops.results"}, path


def test_commands_import_operations_inside_their_functions() -> None:
    for path in _modules():
        if _room(path) == "cli":
            heavy = ("loratools.ops", "loratools.formats", "loratools.methods", "loratools.maths", "rich")
            assert not [name for name, at_top in _imports(path) if at_top and name.startswith(heavy)], path


@pytest.mark.parametrize("path", _modules(), ids=_ids)
def test_only_the_command_line_prints(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "input")
    ]
    assert _room(path) in ("cli", "__main__") or not calls


@pytest.mark.parametrize("package", ["formats", "kinds", "methods"])
def test_files_of_one_kind_know_nothing_of_each_other(package: str) -> None:
    public = {path.stem for path in (PACKAGE / package).glob("[!_]*.py")}
    for path in (PACKAGE / package).glob("[!_]*.py"):
        others = {f"loratools.{package}.{name}" for name in public - {path.stem}}
        assert not others & {name for name, _ in _imports(path)}, path


def _modules_after(code: str) -> set[str]:
    script = code + "\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        timeout=60,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_no_library() -> None:
    assert not _modules_after("import loratools") & LIBRARIES


def test_info_of_safetensors_and_npz_never_imports_torch(tmp_path: Path) -> None:
    import numpy

    kohya = make.kohya(
        tmp_path / "a.safetensors", "sd15", mid=True, extra={"bf16": make.torch.ones(2).bfloat16()}
    )
    half = make.kohya(tmp_path / "h.safetensors", "sdxl", dtype=make.torch.bfloat16)
    peft = make.peft(tmp_path / "p", embedding=True)
    mlx = make.mlx(tmp_path / "m")
    arrays = {key: tensor.numpy() for key, tensor in mlx.tensors.items()}
    numpy.savez(tmp_path / "adapters.npz", **arrays)
    paths = [str(path) for path in (kohya.path, half.path, peft.path, mlx.path, tmp_path / "adapters.npz")]
    code = f"import loratools\nfor path in {paths!r}:\n    assert loratools.info(path).modules"
    assert "torch" not in _modules_after(code)


def test_headers_alone_need_no_numpy(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    code = f"import loratools\nassert loratools.info({str(made.path)!r}, norms=False).modules"
    assert not _modules_after(code) & {"torch", "numpy", "scipy", "rich", "click"}


def test_loading_is_lazy(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    code = f"import loratools\nassert loratools.load({str(made.path)!r}).modules"
    assert not _modules_after(code) & {"torch", "numpy"}
