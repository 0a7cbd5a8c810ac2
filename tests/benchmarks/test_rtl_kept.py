"""Kept results: made once, again where anything that they depend on has changed."""

import pytest

from benchmarks.rtl.kept import digest, kept


def test_a_result_is_made_once_and_again_when_its_file_changes(tmp_path):
    source = tmp_path / "design.v"
    made = []

    def result(text, clock=2.0):
        source.write_text(text)
        key = digest([source], clock)
        return kept(tmp_path / "kept", "design", key, lambda: made.append(text) or len(made))

    assert [result("a"), result("a"), result("b"), result("a"), result("a", 3.4)] == [1, 1, 2, 1, 3]


def test_a_run_that_is_cut_off_keeps_nothing_of_that_result(tmp_path):
    def cut_off():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, "design", "key", cut_off)
    assert not list(tmp_path.iterdir())
    assert kept(tmp_path, "design", "key", lambda: 7) == 7


def test_nothing_is_kept_without_a_directory():
    made = iter((1, 2))
    assert [kept(None, "design", "key", lambda: next(made)) for _ in range(2)] == [1, 2]
