"""What keeps the house in order: who imports whom, what starts without torch, sizes, names, documented settings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import config_page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("afd", "stepmesh")
MAX_LINES = 500
CODE = {".py", ".pyi", ".c", ".cpp", ".h"}
LOOSE = {"__init__", "__main__", "config", "errors", "types"}
VAGUE = re.compile(r"(utils?|common|helpers?|misc|.*manager)\.\w+")
TORCH = re.compile(
    r"afd/(model|ops|relay|attention|ffn|encoder)/|afd/(kv/cache|host/memory|worker/(process|threads))\.py|stepmesh/tensor\.py"
)
LIGHT = {  # what must start without what is slow to import, or not there
    "import afd.cluster.supervisor, afd.cli.status, afd.cli as m; m.main(['up', '--dry-run'])": (
        "torch transformers matplotlib grpc fastapi"
    ),
    "from afd.cli.main import build_parser as build; build('status')": "torch numpy asyncio grpc gguf tokenizers",
    "import afd.gateway.serve, afd.gateway.intake.child": "torch transformers matplotlib grpc",
    "import afd.coordinator.service, afd.membership.thread": "torch transformers matplotlib numpy fastapi",
    "import afd.worker.seat, afd.worker.data_plane": "torch transformers matplotlib fastapi",
    "import afd.plan.commands, afd.simulate.cluster, afd.simulate.scenario": "torch transformers matplotlib grpc zmq",
    "import afd.load.runner, afd.trace.collect": "torch transformers matplotlib grpc zmq numpy",
    "import afd.sched.scheduler, afd.sched.policy, afd.kv.block_pool, afd.ffn.gang": "torch grpc zmq numpy",
    "import afd.model.tokenizer_files, afd.model.loading as m; m.resolve_model('dummy:step3-tiny')": (
        "torch transformers grpc zmq"
    ),
    "import stepmesh, stepmesh.cli.main, stepmesh.compat, stepmesh.rendezvous": "torch pyverbs afd zmq msgspec grpc",
}
WORKERS = ("afd/attention", "afd/ffn", "afd/worker")
NAMED_TUPLE = {"_fields", "_make", "_replace", "_asdict"}
FOREIGN_WORDS = {  # pattern: where it must not occur
    r"\b(is_cpu|native_kernels|Packed)\b": "afd/model",  # what computes is chosen in afd/ops/select.py
    r"(?i)relay": (
        "afd/attention/engine.py afd/attention/stages.py afd/attention/exchange.py afd/attention/mesh_exchange.py"
        " afd/ffn/engine.py afd/model afd/ops"
    ),  # a leg is a leg, whoever goes it
}
WALL_CLOCK = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"now", "utcnow", "today"}}
TOLD = {
    "afd/telemetry/log.py": "log lines",
    "afd/gateway/api/openai.py": "`created` of an answer",
    "afd/gateway/served_model.py": "`created` of the model",
    "afd/gateway/templating.py": "a template's date",
    "afd/load/report.py": "a report's date",
}
VARIABLE = re.compile(r"(AFD|STEPMESH|DMLC)_[A-Z0-9_]*[A-Z0-9]")


def files(*folders: str, suffixes: set[str] = CODE) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


@cache
def syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of_files(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules among them that it imports anywhere: at its top, in a function, under TYPE_CHECKING."""
    graph: dict[str, set[str]] = {}
    for module, syntax in modules.items():
        found = graph.setdefault(module, set())
        for node in ast.walk(syntax):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                assert node.level == 0, f"{module} imports relatively"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update(inner & modules.keys())
                if inner - modules.keys():
                    found.add(node.module)
        found &= modules.keys() - {module}
    return graph


def module_of(path: Path) -> str:
    return name_of(path).rsplit(".", 1)[0].replace("/", ".").removesuffix(".__init__")


# --- imports ----------------------------------------------------------------------------------------------


def test_each_layer_imports_from_those_below_it() -> None:
    """The rows stand in pyproject.toml; a new folder of afd/ needs a place there."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout


def test_a_circle_is_seen_wherever_the_import_stands() -> None:
    lazily = "if TYPE_CHECKING:\n    from pack import b"
    sources = {"pack": "", "pack.a": lazily, "pack.b": "def f():\n    from pack.a import thing"}
    graph = imports_of_files({module: ast.parse(source) for module, source in sources.items()})
    assert graph == {"pack": set(), "pack.a": {"pack.b"}, "pack.b": {"pack.a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_no_two_files_import_each_other() -> None:
    """Neither for types only nor by way of others: such files are one, or a third is missing."""
    modules = {module_of(path): syntax_of(path) for path in files(*PACKAGES, suffixes={".py", ".pyi"})}
    try:
        TopologicalSorter(imports_of_files(modules)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("program", LIGHT)
def test_what_needs_no_tensors_starts_without_torch(program: str) -> None:
    code = f"import sys; {program}; sys.exit(' '.join({set(LIGHT[program].split())!r} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_stays_in_its_rooms() -> None:
    uses = re.compile(r"^\s*(import|from) torch\b", re.MULTILINE)
    found = {name_of(path) for path in files(*PACKAGES, suffixes={".py"}) if uses.search(path.read_text("utf-8"))}
    assert [name for name in sorted(found) if not TORCH.match(name)] == []


# --- files ------------------------------------------------------------------------------------------------


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lines = {name_of(path): path.read_bytes().count(b"\n") for path in files(*PACKAGES, "bench", "tests")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_nothing_lies_loose_and_every_name_says_what_is_inside() -> None:
    assert {path.stem for path in (ROOT / "afd").glob("*.py")} == LOOSE
    assert [name_of(path) for path in files(*PACKAGES, "bench", "tests") if VAGUE.fullmatch(path.name)] == []


def test_every_package_says_what_it_is() -> None:
    folders = {path.parent for path in files(*PACKAGES, suffixes={".py"})}
    silent = []
    for folder in folders:
        init = folder / "__init__.py"
        if not init.exists() or ast.get_docstring(syntax_of(init)) is None:
            silent.append(name_of(folder))
    assert silent == []


def test_the_map_of_the_rooms_is_whole() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {f"afd/{path.parent.name}" for path in (ROOT / "afd").glob("*/__init__.py")}
    assert set(re.findall(r"afd/\w+(?=\s)", page.split("```")[1])) == rooms


# --- workers ----------------------------------------------------------------------------------------------


def test_a_worker_has_all_its_parts_from_the_start() -> None:
    """Parts are built before anybody sees one (`build.py`): none is None until later."""
    found = []
    for path in files(*WORKERS, suffixes={".py"}):
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.Assert) and re.search(r" is not None\b", ast.unparse(node.test)):
                found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


def test_a_worker_is_put_together_and_inherits_nothing() -> None:
    bases = set()
    for path in files(*WORKERS, suffixes={".py"}):
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.ClassDef):
                bases.update(map(ast.unparse, node.bases))
    assert bases <= {"Protocol", "NamedTuple", "msgspec.Struct", "Collector"}


def private_names(module: ast.Module) -> set[str]:
    """Methods and attributes of its classes that are nobody else's business."""
    defined = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    used = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    return {name for name in defined | used if re.match("_[a-z]", name)} - set(dir(tuple)) - NAMED_TUPLE


def test_tests_see_of_a_worker_what_its_callers_see() -> None:
    paths = (*files(*WORKERS, suffixes={".py"}), ROOT / "afd/sched/core.py", ROOT / "afd/sched/scheduler.py")
    private = set().union(*(private_names(syntax_of(path)) for path in paths))
    assert {"_turn", "_run_stages", "_leases", "_running"} & private
    found = []
    for path in files("tests", suffixes={".py"}):
        modules = {node.module or "" for node in ast.walk(syntax_of(path)) if isinstance(node, ast.ImportFrom)}
        if not any(module.startswith(("afd.attention", "afd.ffn", "afd.worker", "afd.sched")) for module in modules):
            continue
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self":
                found.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)}")
    assert found == []


@pytest.mark.parametrize(("word", "rooms"), FOREIGN_WORDS.items())
def test_a_room_does_not_know_the_business_of_another(word: str, rooms: str) -> None:
    places = [path for room in rooms.split() for path in (files(room) if (ROOT / room).is_dir() else [ROOT / room])]
    assert places
    assert [name_of(path) for path in places if re.search(word, path.read_text("utf-8"))] == []


# --- settings ---------------------------------------------------------------------------------------------


def test_every_key_of_the_configuration_is_documented() -> None:
    """After a change: `python -m tests.config_page`."""
    assert "|  |" not in config_page.page(), "a key without a meaning"
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page()


def test_every_environment_variable_that_is_read_is_documented() -> None:
    read = set()
    for path in files(*PACKAGES, suffixes={".py"}):
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                read.add(node.value)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    told = {match[0] for path in pages for match in VARIABLE.finditer(path.read_text(encoding="utf-8"))}
    assert len(read) > 10 and read - told == set()


# --- clocks -----------------------------------------------------------------------------------------------


def reads_wall_clock(module: ast.Module) -> bool:
    """Whether a module names it: `time.time`, `datetime.datetime.now`, `from time import time`."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module in WALL_CLOCK:
            if any(alias.name in WALL_CLOCK[node.module] for alias in node.names):
                return True
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in WALL_CLOCK.get(owner, ()):
                return True
    return False


def test_the_look_for_clocks_sees_them() -> None:
    for seen in ("time.time()", "x = time.time", "datetime.datetime.now()", "from time import time", "time.time_ns()"):
        assert reads_wall_clock(ast.parse(seen)), seen
    for other in ("time.monotonic()", "time.perf_counter()", "self.time", "from time import sleep"):
        assert not reads_wall_clock(ast.parse(other)), other


def test_the_wall_clock_which_jumps_is_only_told() -> None:
    paths = files(*PACKAGES, suffixes={".py"})
    found = {name_of(path) for path in paths if reads_wall_clock(syntax_of(path))}
    assert found == set(TOLD)
