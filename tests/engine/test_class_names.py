import logging
from pathlib import Path

import numpy as np
import pytest
from data_sets import write_class_folders

from diffdfkd.engine.class_names import class_order, match_classes
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images

WNIDS = ["n02124075", "n01443537", "n04146614"]


def test_names_are_matched_one_to_one_or_not_at_all(tmp_path: Path) -> None:
    cranes = [["n1", "crane"], ["n2", "crane"], ["n3", "goose"]]
    assert match_classes(cranes, ["n3", "n1", "n2"], tmp_path) == [1, 2, 0]
    with pytest.raises(UserError, match="do not match"):
        match_classes(cranes, ["goose", "crane", "heron"], tmp_path)
    assert match_classes([["b"], ["a"]], ["a", "c", "b"], tmp_path, whole=False) == [2, 0]
    with pytest.raises(UserError, match="the data set has no c"):
        match_classes([["b"], ["a"]], ["a", "c", "b"], tmp_path)
    assert match_classes([["C#"], ["C"]], ["C", "C#"], tmp_path) == [1, 0]  # equal by letters alone


def test_numbered_and_named_folders(tmp_path: Path) -> None:
    assert class_order(["0-C", "1-C_", "2-_"], ["C", "C#", "<>"], tmp_path)[0] == [0, 1, 2]
    with pytest.raises(UserError, match="do not match"):
        class_order(["0-C", "1-C_", "2-x"], ["C", "C#", "<>"], tmp_path)
    assert class_order(["0-3", "1-3"], ["0-3", "1-3"], tmp_path)[0] == [0, 1]


def test_imagenets_folders_by_wnid_or_by_the_words_beside_them(tmp_path: Path) -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    folder = write_class_folders(tmp_path / "ImageNet" / "val", images, range(3), WNIDS)
    assert open_images(folder, classes=WNIDS).read(range(3))[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    names = ["school bus", "Egyptian cat", "goldfish"]
    with pytest.raises(UserError, match=r"named by wnids .* put a words\.txt"):
        open_images(folder, classes=names)
    mapping = tmp_path / "ImageNet" / "LOC_synset_mapping.txt"
    mapping.write_text("n02124075 Egyptian cat\nn01443537 goldfish, Carassius auratus\nn04146614 school bus\n")
    pixels, labels = open_images(folder, classes=names).read(range(3))
    assert labels.tolist() == [0, 1, 2] and pixels[:, 0, 0, 0].tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="the teacher has no n01443537"):
        open_images(folder, classes=["school bus", "Egyptian cat", "goldfishes"])
    (folder.parent / "train").mkdir()
    with pytest.raises(UserError, match=r"holds train and val, not class folders; give .* such as .*/val"):
        open_images(folder.parent, classes=names)


def test_a_thousand_wnids_are_in_the_order_of_ilsvrc_2012(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [f"n{number:08d}" for number in reversed(range(1000))]
    with caplog.at_level(logging.WARNING):
        order, _ = class_order(folders, [f"class {number}" for number in range(1000)], tmp_path)
    assert order == list(reversed(range(1000))) and "as in ILSVRC 2012" in caplog.text
