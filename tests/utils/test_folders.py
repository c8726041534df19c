import pytest

from hf_esm.utils import atomic_file


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "scores.json"
    with atomic_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with atomic_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_after_an_error_the_earlier_file_stays_and_nothing_is_next_to_it(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("first")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_temporary_path_has_the_suffix_that_its_writer_needs(tmp_path):
    with atomic_file(tmp_path / "a.json") as json, atomic_file(tmp_path / "statistics.st", ".safetensors") as tensors:
        assert (json.suffix, tensors.suffix) == (".json", ".safetensors")
        json.touch()
        tensors.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "statistics.st"]
