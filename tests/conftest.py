"""What tests of several packages need."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import is_hypothesis_test, settings
from packaging.version import Version

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import CorruptFile, FlexGenError
from tests.simulated_gpu.plugin import gpu_of_marked_tests, known_verdicts, one_check  # noqa: F401 - fixtures
from tests.workbench import Workbench

TESTS = Path(__file__).parent
LATER = {"5.21": ("[olmo_hybrid]", "where_single_rows_are_forced[gemma2]"), "5.23": ("tensor_that_the_library_makes",)}
"""By version of transformers, parts of the names of tests that need it. Older ones refuse these models by name at load."""


LONGEST_FILES = (
    "runtime/test_exactness.py",
    "runtime/test_real_model.py",
    "helm/test_equality.py",
    "test_pages.py",
    "evaluation/test_evaluate.py",
    "loading/test_first_layers.py",
    "runtime/test_gpu.py",
    "survey/test_survey.py",
    "runs/test_resident_benchmark.py",
    "runtime/test_gpu_building.py",
    "runtime/test_lossless.py",
    "runtime/test_offload.py",
    "loading/test_loading_memory.py",
    "helm/test_hybrids.py",
)
"""Files that take longest. They come first, so that no process is left with one of them at the end."""


FEW, SHARE = 8, 3
"""Where slow tests are left out, property tests try a third of their examples, but no fewer than so many."""


def _try_fewer_examples(items: list[pytest.Item]) -> None:
    for test in {item.obj for item in items if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)}:
        test = getattr(test, "__func__", test)  # of a class
        given = test._hypothesis_internal_use_settings
        if given.max_examples > FEW:
            test._hypothesis_internal_use_settings = settings(given, max_examples=max(FEW, given.max_examples // SHARE))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips what an older transformers, which is allowed, cannot do."""
    if config.getoption("markexpr") == "not slow":
        _try_fewer_examples(items)
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(str(item.path.relative_to(TESTS)), len(order)))
    for version, names in LATER.items():
        if Version(transformers.__version__) < Version(version):
            for item in items:
                if any(name in item.nodeid for name in names):
                    item.add_marker(pytest.mark.skip(reason=f"needs transformers {version}"))


if settings.get_current_profile_name() == "default":
    # The same examples in every run, so that no test fails now and then; a busy machine misses deadlines.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Exempts what all tests need, some millions of objects, from each of the many collections of garbage that follow."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Lets libraries end as they would, for some of them complain about what is left."""
    gc.unfreeze()


def pytest_report_header() -> str:
    return f"transformers {transformers.__version__} ({Path(transformers.__file__).parent})"


def pytest_configure() -> None:
    """Stops a run that was meant for another version of transformers (``make test-versions``)."""
    wanted = os.environ.get("FLEXGEN_HELM_TRANSFORMERS")
    if wanted and Version(wanted) != Version(transformers.__version__):
        raise pytest.UsageError(f"transformers {wanted} is to be tested, but {transformers.__version__} is imported")


FETCHED = ("assets", "random_models", "compiled")
"""Folders of the cache folder that every run of the tests uses; everything else, such as verdicts, is a run's own."""
MEASURED = ("matmul",)
"""Folder of the cache folder that all tests of a run share: the faster library of products, which takes a second to measure.
On a busy machine a second measurement may choose the other one, and then two engines that should agree by a bit do not."""


def _link(cache: Path, shared: Path, names: tuple[str, ...]) -> None:
    """Makes a cache folder that holds only some folders of another one; two processes may make it."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        (shared / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (cache / name).symlink_to(shared / name)


@pytest.fixture(scope="session", autouse=True)
def shared_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, tuple[str, ...]]]:
    """Gives this run a cache folder, so that its processes check equal models once; returns what every test may share."""
    users, root = cache_folder().resolve(), tmp_path_factory.getbasetemp()
    cache = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"
    _link(cache, users, FETCHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXGEN_HELM_CACHE", str(cache))
        yield {users: FETCHED, cache: MEASURED}


@pytest.fixture(autouse=True)
def _own_verdicts(request: pytest.FixtureRequest, shared_caches: dict[Path, tuple[str, ...]]) -> None:
    """Gives a test that patches anything a cache folder of its own: a patched check must decide for no other test."""
    if "monkeypatch" in request.fixturenames:
        cache = request.getfixturevalue("tmp_path_factory").mktemp("cache")
        for shared, names in shared_caches.items():
            _link(cache, shared, names)
        request.getfixturevalue("monkeypatch").setenv("FLEXGEN_HELM_CACHE", str(cache))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once; skips the test where that is not possible."""
    try:
        return smollm2_folder()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """The models of this session. Row sizes of the policies are right for one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workbench = Workbench(tmp_path_factory.mktemp("tiny_models"))
    yield workbench
    workbench.close()
    torch.set_num_threads(threads)
