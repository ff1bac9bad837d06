"""The tree is the design: a module imports only from lower layers, and each outside library has one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rapidin_vdb"
LAYERS = {
    "errors": 0, "arguments": 1, "compiled": 0, "matmul": 0, "machine": 0, "intrinsics": 1, "ledger": 1, "records": 1, "recipe": 1, "progress": 1, "batches": 2, "locks": 1, "results": 2, "corpus": 2, "sketch": 2, "gradient": 3, "store": 3,
    "pieces": 1, "page": 3, "question": 3, "focus": 2, "index": 3, "engine": 4, "table_index": 4, "coarse_notes": 4, "index_cache": 4, "freshness": 5, "query": 4, "uncertainty": 4, "ranking": 5, "token_ranking": 6, "explanation": 5, "pooling": 6, "answering": 7, "verification": 6,
    "compute": 5, "worker_log": 1, "workers": 6, "intake": 3, "notices": 4, "plan": 5, "ingest": 6, "cluster": 6, "roads": 7, "estimate": 7, "database": 8, "creation": 9, "demo": 10, "evaluate": 9, "comparison": 5, "reading": 6, "speaker": 7, "choice": 4, "cleaning": 5, "new_file": 1, "web": 10, "cli": 11, "__init__": 12, "__main__": 13,
}  # fmt: skip
HOMES = {
    "transformers": {"gradient"}, "peft": {"gradient"}, "bitsandbytes": {"gradient"}, "tokenizers": {"gradient"}, "huggingface_hub": {"gradient"},
    "safetensors": {"gradient"}, "lancedb": {"store"}, "lance": {"store"}, "obstore": {"store"}, "boto3": {"store"}, "botocore": {"store"}, "ray": {"cluster"}, "sqlite3": {"ledger"}, "filelock": {"store", "index", "locks"}, "numba": {"compiled", "intrinsics"}, "llvmlite": {"intrinsics"}, "triton": {"sketch"}, "pyarrow": {"store", "corpus", "results"}, "faiss": {"index"},
    "typer": {"cli"}, "rich": {"cli"}, "jinja2": {"corpus"}, "torch": {"gradient", "sketch", "compute", "index", "compiled", "matmul", "machine", "evaluate"}, "sklearn": {"evaluate"}, "scipy": {"evaluate"}, "bm25s": {"evaluate"}, "sentence_transformers": {"evaluate"}, "matplotlib": {"evaluate"}, "fastapi": {"web"}, "uvicorn": {"web"}, "pydantic": {"web"}, "starlette": {"web"}, "prometheus_client": {"web"}, "click": set(),
}  # fmt: skip


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "rapidin_vdb" else [node.module or ""]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_stay_at_home(path):
    here = module_of(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top in HOMES:
            assert here in HOMES[top], f"{path} imports {top}, which belongs to {HOMES[top]}"
        if top == "rapidin_vdb" and rest and rest[0] in LAYERS and rest[0] != here:
            assert LAYERS[rest[0]] < LAYERS[here], f"{path} (layer {LAYERS[here]}) imports {name}"


def test_every_module_has_a_layer():
    assert {module_of(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # A benchmark of the GPU cuts them as an ingest does, where lancedb is not installed.
        ("batches", {"lancedb", "pyarrow", "torch"}),
        # Each worker holds what it imports: with these it took 130 MB more, and twice as long to begin.
        ("workers", {"lancedb", "pyarrow", "pandas", "faiss"}),
    ],
)
def test_what_needs_no_table_imports_no_library_of_it(module, absent):
    code = f"import sys, rapidin_vdb.{module}; print({absent} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_files_stay_short():
    assert {str(path): lines for path in FILES if (lines := len(path.read_text("utf-8").splitlines())) > 300} == {}
