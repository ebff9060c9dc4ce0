"""Kept scenes: the same images as drawn ones, whatever happens to their file."""

import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from sptseg.data.benchmarks import load_benchmark
from sptseg.data.glyphs import GlyphScenes
from sptseg.data.scene_cache import CHECKSUM, KeptScenes, read_scene, write_scene


def scenes(**changes):
    return GlyphScenes(**{"label_set": "glyphs-20", "split": "val", "length": 6, "size": 48, **changes})


def same(kept, drawn):
    pairs = list(zip(kept, drawn, strict=True))
    return all(torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in pairs)


def forbid(monkeypatch):
    def drawn(self, index):
        raise AssertionError(f"image {index} was drawn")

    monkeypatch.setattr(KeptScenes, "draw", drawn)


def test_the_second_use_reads_and_longer_sets_share_the_file(tmp_path, monkeypatch):
    assert same(KeptScenes(scenes(), tmp_path), scenes())
    assert len(list(tmp_path.glob("scenes/*"))) == 1
    forbid(monkeypatch)
    assert same(KeptScenes(scenes(), tmp_path), scenes())
    kept = KeptScenes(scenes(length=20), tmp_path)
    assert torch.equal(kept[3].image, scenes()[3].image) and kept[3].name == scenes()[3].name
    assert torch.equal(kept[-17].mask, kept[3].mask)
    with pytest.raises(IndexError):
        kept[20]


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped", "empty"])
def test_damage_is_noticed_and_mended(tmp_path, damage):
    kept = KeptScenes(scenes(), tmp_path)
    list(kept)
    content, length = bytearray(kept.path.read_bytes()), CHECKSUM + 4 * 48 * 48
    assert len(content) == 6 * length
    if damage == "flipped":
        content[2 * length + 100] ^= 1
    if damage == "swapped":
        content[:length], content[length : 2 * length] = content[length : 2 * length], content[:length]
    kept.path.write_bytes(content[: {"cut": 3 * length + 9, "empty": 0}.get(damage)])
    assert same(KeptScenes(scenes(), tmp_path), scenes())
    assert all(read_scene(kept.path, index, 4 * 48 * 48) for index in range(6))


def test_whole_records_of_other_images_are_not_believed(tmp_path):
    kept, other = KeptScenes(scenes(), tmp_path), KeptScenes(scenes(seed=1), tmp_path)
    for index in range(6):
        write_scene(kept.path, index, other.content(index))
    assert same(kept, scenes())


def test_another_drawing_code_has_another_file(tmp_path, monkeypatch):
    before = KeptScenes(scenes(), tmp_path).path
    monkeypatch.setattr("inspect.getsource", lambda module: "changed")
    assert KeptScenes(scenes(), tmp_path).path != before


def test_without_a_writable_folder_images_stay_in_memory(tmp_path, monkeypatch):
    (tmp_path / "scenes").write_text("not a folder")
    kept = KeptScenes(scenes(), tmp_path)
    with pytest.warns(UserWarning, match="scenes cannot be kept"):
        first = list(kept)
    forbid(monkeypatch)
    assert same(first, scenes()) and same(kept, scenes())


def test_images_may_be_changed_in_place(tmp_path):
    kept = KeptScenes(scenes(), tmp_path)
    kept[0].image.zero_()
    assert same(kept, scenes())


def read_all(folder, seed):
    kept = KeptScenes(scenes(length=40), folder)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    return all(torch.equal(kept[index].image, kept.scenes[index].image) for index in order)


def test_processes_share_a_file(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(read_all, [(tmp_path, 0), (tmp_path, 1)]) == [True, True]
    kept = KeptScenes(scenes(length=40), tmp_path)
    assert all(kept.read(index) for index in range(40)) and pickle.loads(pickle.dumps(kept)).path == kept.path
    loader = DataLoader(kept, batch_size=None, num_workers=2)
    assert same(loader, scenes(length=40))


def test_benchmarks_keep_their_scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("SPTSEG_CACHE", str(tmp_path))
    benchmark = load_benchmark("glyphs-20", size=48, train_images=3, val_images=2)
    assert len(list(benchmark.train)) == 3 and len(list(benchmark.val)) == 2
    assert len(list(tmp_path.glob("scenes/*.records"))) == 2
