"""Imports go one way, without cycles."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOW = {"cifar10", "runs", "memory", "terminal"}  # import none of our modules
MAY = {
    **{key: set[str]() for key in {*LOW, "networks", "optimization"}},
    "reports": {"cifar10", "runs", "terminal"},
    "callbacks": {"cifar10", "runs", "reports"},
    "cuda_graph": {"cifar10"},
    "datamodule": {"cifar10", "runs"},
    "calibration": {"cifar10", "runs"},
    "lightning_module": {"calibration", "cifar10", "cuda_graph", "networks", "runs"},
    "train": {
        *LOW, "calibration", "callbacks", "datamodule", "lightning_module", "optimization",
        "reports",
    },
    "convert": {"cifar10", "terminal"},
    "export": {*LOW, "calibration", "lightning_module", "reports"},
    "studies": {"train", "runs", "reports", "terminal"},
    "study": {"studies", "runs", "terminal"},
}  # fmt: skip


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_go_one_way() -> None:
    files = [*ROOT.glob("*.py"), *(f for name in MAY for f in (ROOT / name).glob("*.py"))]
    assert {room(file) for file in files} == MAY.keys()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names} & (MAY.keys() | {"benchmarks"})
            assert tops <= MAY[room(file)] | {room(file)}, file
