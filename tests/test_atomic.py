"""What is written is there whole or not at all."""

import pytest

from mimic_video.atomic import atomically


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with atomically(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_directory_takes_the_place_of_an_empty_one_only(tmp_path):
    def write(text):
        with atomically(tmp_path / "x") as partial:
            partial.mkdir()
            (partial / "file").write_text(text)

    (tmp_path / "x").mkdir()
    write("one")
    with pytest.raises(OSError, match="not empty"):
        write("two")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "file").read_text() == "one"


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.mkdir(), lambda path: None])
def test_nothing_is_left_of_what_fails(tmp_path, make):
    with pytest.raises(KeyboardInterrupt), atomically(tmp_path / "x") as partial:
        make(partial)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with atomically(path) as one, atomically(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
