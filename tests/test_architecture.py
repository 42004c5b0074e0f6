"""The house keeps its shape: one direction of imports, nothing heavy at import, nothing happens at import, tidy code."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "latent_guidance"

# What each room may import of the library. Rooms are listed from the ground up; a room may import itself and the rooms listed.
GROUND = {"errors", "devices"}
ALGEBRA = GROUND | {"process", "parameterization"}
CORE = ALGEBRA | {"attention", "windows", "denoiser", "schedules", "step_grids"}
SAMPLING = CORE | {"noise", "samplers", "analytic"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "devices": {"errors"},
    "command_line": {"errors"},
    "process": GROUND,
    "parameterization": ALGEBRA,
    "attention": GROUND,
    "windows": GROUND,
    "denoiser": ALGEBRA | {"attention"},
    "schedules": ALGEBRA,
    "step_grids": ALGEBRA | {"schedules"},
    "noise": CORE,
    "analytic": CORE,
    "samplers": CORE | {"noise"},
    "guidance": CORE,
    "models": CORE | {"guidance"},
    "training": SAMPLING | {"command_line", "guidance", "models"},
    "evaluation": SAMPLING | {"command_line", "guidance", "models", "training"},
    "host": SAMPLING | {"guidance", "models", "evaluation", "training"},
    "cli": SAMPLING | {"guidance", "models", "evaluation", "training", "host"},
    "__main__": {"cli"},
}
HEAVY = {
    "accelerate",
    "diffusers",
    "matplotlib",
    "open_clip",
    "torchmetrics",
    "torchsde",
    "torchvision",
    "transformers",
}


def module_parts(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> list[tuple[str, bool]]:
    """Absolute dotted names that a file imports, and whether it does so at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    package = module_parts(path)[:-1]
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        at_module_level = id(node) not in inner
        if isinstance(node, ast.Import):
            found += [(alias.name, at_module_level) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            if module == ["latent_guidance"] or not node.module:
                found += [(".".join([*module, alias.name]), at_module_level) for alias in node.names]
            else:
                found.append((".".join(module), at_module_level))
    return found


LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
PACK_FILES = sorted((ROOT / "nodes").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_inside_the_library_go_one_way(path: Path) -> None:
    room = module_parts(path)[1]
    for name, _ in imported(path):
        parts = name.split(".")
        assert parts[0] not in {"comfy", "nodes", "folder_paths", "execution"}, f"{path.name} imports {name}"
        if parts[0] == "latent_guidance" and len(parts) > 1 and parts[1] not in {room, "__version__"}:
            assert parts[1] in ALLOWED[room], f"{room} must not import {parts[1]} ({path.name})"


@pytest.mark.parametrize("path", LIBRARY_FILES + PACK_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    heavy = [name for name, at_module_level in imported(path) if at_module_level and name.split(".")[0] in HEAVY]
    assert not heavy, f"{path.name} imports {heavy} at module level"


@pytest.mark.parametrize("path", PACK_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_runtime_seam_imports_comfyui(path: Path) -> None:
    comfy = [
        name
        for name, _ in imported(path)
        if name.split(".")[0] in {"comfy", "folder_paths", "comfy_execution", "latent_preview"}
    ]
    assert not comfy or path.relative_to(ROOT).parts[:2] == ("nodes", "runtime"), f"{path.name} imports {comfy}"


def test_importing_the_library_loads_nothing_heavy() -> None:
    rooms = "errors process parameterization denoiser schedules samplers noise analytic guidance models host cli"
    code = (
        "import sys, importlib\n"
        f"for room in {rooms.split()!r}: importlib.import_module('latent_guidance.' + room)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_beside_the_clone_its_name_still_means_the_library(tmp_path: Path) -> None:
    """A script in the folder above a clone finds the pack's folder under the library's name."""
    (tmp_path / "latent_guidance").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "script.py").write_text(
        "import latent_guidance, latent_guidance.process as process\n"
        "from latent_guidance.guidance import CFG\n"
        "print(latent_guidance.__version__, process.__file__, CFG.__module__, sep='|')"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, check=True)
    version, file, module = done.stdout.strip().split("|")
    assert version and module == "latent_guidance.guidance.cfg"
    assert Path(file) == tmp_path / "latent_guidance" / "latent_guidance" / "process.py"


def test_importing_the_package_costs_next_to_nothing_beside_torch() -> None:
    """What rules and samplers add to `import torch` in one process, the best of three, in processor time: as its share."""
    timed = (
        "import time; start = time.process_time(); import torch; between = time.process_time(); "
        "import latent_guidance, latent_guidance.guidance, latent_guidance.samplers; "
        "print((time.process_time() - between) / (between - start))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, cwd=ROOT, check=True)
        for _ in range(3)
    ]
    assert 0 < min(float(done.stdout) for done in runs) <= 0.3


def test_no_file_is_past_four_hundred_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in LIBRARY_FILES + PACK_FILES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_no_pickle_and_no_evaluation_of_text() -> None:
    """Nothing that a stranger's file could turn into code is called anywhere."""
    for path in LIBRARY_FILES + PACK_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"}, (
                    f"{path.name}: {name}"
                )


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_the_linter_has_nothing_to_say(command: list[str]) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed (it comes with the [test] extra)")
    done = subprocess.run([ruff, *command[1:], "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_type_checker_has_nothing_to_say() -> None:
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("basedpyright is not installed (it comes with the [test] extra)")
    done = subprocess.run(
        [checker, "--pythonpath", sys.executable, "--level", "error"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:]
