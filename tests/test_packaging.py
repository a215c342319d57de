"""The distribution maps the top-level folders onto one name, from a checkout and from an sdist."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("quant", "eval", "eval/load", "serving", "serving/moe", "serving/sglang_plugin", "flows")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    return out


def test_the_wheels_only_top_level_name_is_lightship(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lightship"}


def test_the_wheel_holds_every_module_of_the_checkout(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"src/lightship": "lightship", **{f: f"lightship/{f}" for f in PARTS}}
    modules = {f"{inside}/{p.name}" for folder, inside in folders.items() for p in (ROOT / folder).glob("*.py")}
    assert modules <= names


def test_the_sdist_carries_the_licence_and_builds(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "pyproject.toml", "quant/plan.py", "src/lightship/cli.py"} <= names


def test_no_folder_shadows_the_docker_sdk() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()


@pytest.mark.parametrize(
    "folder", ["src/lightship", "quant", "eval", "eval/load", "serving", "serving/moe", "serving/sglang_plugin"]
)
def test_only_flows_know_prefect_and_dask(folder: str) -> None:
    modules = sorted((ROOT / folder).glob("*.py"))
    assert modules
    for module in modules:
        imported = set[str]()
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        assert not imported & {"prefect", "prefect_dask", "dask", "distributed"}, module
