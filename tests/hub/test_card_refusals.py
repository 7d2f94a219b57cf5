"""What no card is written for."""

import shutil

import pytest

from quantmill.errors import BadCheckpoint, BadRequest, SourceNotFound
from quantmill.hub.card import write_card


@pytest.mark.parametrize(
    "arguments", [{"name": "a b"}, {"owner": "x/y"}, {"name": "me/x", "owner": "you"}, {"name": "-"}]
)
def test_names_that_no_hub_takes(repository, arguments):
    with pytest.raises(BadRequest, match="owner"):
        write_card(repository, **arguments)
    assert not (repository / "README.md").exists()


def test_folders_that_hold_no_branch(tmp_path):
    with pytest.raises(SourceNotFound, match="quantmill quantize --out"):
        write_card(tmp_path / "absent")
    with pytest.raises(BadCheckpoint, match="no branch folder"):
        write_card(tmp_path)


def test_a_damaged_branch_stops_the_card(repository):
    (repository / "main" / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint):
        write_card(repository)
    shutil.rmtree(repository / "main")
    write_card(repository)
