"""Our access to HELM's request cache, against HELM's own."""

from __future__ import annotations

import json
import pickle
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.key_value_store import SqliteKeyValueStore, request_to_key

from flexgen_helm.errors import DiskFull, FlexGenError
from flexgen_helm.helm.response_cache import ResponseCache, ResponseCaches
from tests.helm.test_journal import response

KEYS = [request_to_key({"prompt": f"é \udc80 {number}", "numerics": {"b": 1, "a": number}}) for number in range(5)]


def test_helm_reads_what_we_write_and_we_what_helm_writes(tmp_path: Path) -> None:
    path = str(tmp_path / "helm.sqlite")
    with SqliteKeyValueStore(path) as store:
        store.put(json.loads(KEYS[0]), dict(response(0)))
    cache = ResponseCache(SqliteCacheConfig(path))
    cache.write((key, response(number)) for number, key in enumerate(KEYS[1:4], start=1))
    assert cache.lookup(KEYS) == [response(0), response(1), response(2), response(3), None]
    cache.close()
    with SqliteKeyValueStore(path) as store:
        assert [store.get(json.loads(key)) for key in KEYS] == [*map(response, range(4)), None]


def test_many_threads_and_another_process_do_not_lock_each_other_out(tmp_path: Path) -> None:
    config = SqliteCacheConfig(str(tmp_path / "helm.sqlite"))
    caches = ResponseCaches()
    stop = threading.Event()

    def other_writer() -> None:
        connection = sqlite3.connect(config.path, timeout=60)
        # SQLite's lock is not fair: one who takes it again at once may keep all others out for a minute.
        while not stop.wait(0.002):
            with connection:
                connection.execute('REPLACE INTO "unnamed" VALUES ("other", "x")')
        connection.close()

    caches.get(config)
    thread = threading.Thread(target=other_writer)
    thread.start()
    try:
        with ThreadPoolExecutor(64) as threads:
            list(threads.map(lambda number: caches.get(config).write([(f"{number}", response(number))]), range(640)))
    finally:
        stop.set()
        thread.join()
    assert caches.get(config).lookup([str(number) for number in range(640)]) == [response(number) for number in range(640)]
    caches.close()


def test_an_answer_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    cache = ResponseCache(SqliteCacheConfig(str(tmp_path / "helm.sqlite")))

    def is_there(number: int) -> bool:
        cache.write([(str(number), response(number))])
        with SqliteKeyValueStore(str(tmp_path / "helm.sqlite")) as store:
            return str(number) in store._sqlite_dict

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(is_there, range(40)))


def test_a_changed_byte_is_no_answer_and_neither_is_that_of_another_key(tmp_path: Path) -> None:
    path = str(tmp_path / "helm.sqlite")
    cache = ResponseCache(SqliteCacheConfig(path))
    cache.write([(KEYS[0], response(0)), (KEYS[1], response(1))])
    with sqlite3.connect(path) as connection:
        ((whole,), (other,)) = connection.execute('SELECT value FROM "unnamed" ORDER BY rowid').fetchall()

    def store(value: object) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute('UPDATE "unnamed" SET value = ? WHERE key = ?', (value, KEYS[0]))

    for at in range(0, len(whole), 7):
        store(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.lookup(KEYS[:1]) in ([None], [response(0)])
    for value in (other, None, 5, "text", b"", pickle.dumps({"text": "of another version"}), pickle.dumps([1])):
        store(value)
        assert cache.lookup(KEYS[:1]) == [None]
    store(pickle.dumps(response(0)))  # written before there were checksums
    assert cache.lookup(KEYS[:1]) == [response(0)]


def test_disabled_cache_stores_nothing() -> None:
    cache = ResponseCache(BlackHoleCacheConfig())
    cache.write([(KEYS[0], response(0))])
    assert cache.lookup(KEYS[:2]) == [None, None]


def test_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "helm.sqlite"
    path.write_text("not a database at all" * 100)
    with pytest.raises(FlexGenError, match=r"helm\.sqlite cannot be read or written: file is not a database\. Check"):
        ResponseCache(SqliteCacheConfig(str(path)))


def test_full_disk_is_named_and_the_next_write_catches_up(tmp_path: Path) -> None:
    cache = ResponseCache(SqliteCacheConfig(str(tmp_path / "helm.sqlite")))
    connection: sqlite3.Connection = cache._store._connection  # type: ignore[attr-defined]
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="Free some space"):
        cache.write((str(number), response(number)) for number in range(100))
    connection.execute("PRAGMA max_page_count = 100000")
    cache.write([("100", response(100))])
    assert cache.lookup([str(number) for number in range(101)]) == [response(number) for number in range(101)]
