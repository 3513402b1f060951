"""A whole federation: repeatable, and what one site knows helps the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data

from feddymem.aggregate import aggregate
from feddymem.backbone import FeatureExtractor
from feddymem.distances import nearest_items
from feddymem.federation import MAX_ORIGINS, MEMORY_TYPE, FederatedMemory, federate, next_memory
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.method import ItemType, Method
from feddymem.patches import PatchArray, PatchSource

GRID, CHANNELS = 4, 8
METHOD = Method(generator=True, bank_items=24, memory_items=60)


def features(centre: float, images: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """Patches around a place that differs from site to site."""
    return np.random.default_rng(seed).normal(centre, 1, (images, GRID * GRID, CHANNELS)).astype(np.float32)


def two_sites() -> dict[str, PatchSource]:
    return {"a": PatchArray(features(0, seed=1)), "b": PatchArray(features(6, seed=2))}


def method(**changes: Any) -> Method:
    return Method(**(METHOD.model_dump() | changes))


def distance(outcome: FederatedMemory, site: str, patches: NDArray[np.float32]) -> float:
    """Mean distance of patches to the memory, as the site would score them."""
    mapped, generator = torch.from_numpy(patches), outcome.generators[site]
    if generator is not None:
        mapped = generator(mapped)
    return float(nearest_items(mapped.flatten(0, 1), torch.from_numpy(outcome.memory.items))[0].mean())


def assert_same_memory(a: MemoryBank, b: MemoryBank) -> None:
    for name in ("items", "weights", "spreads"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("switched", [True, False])
def test_the_outcome_is_the_same_for_the_same_arguments(switched: bool) -> None:
    first, second = (federate(two_sites(), method(generator=switched)) for _ in range(2))
    assert_same_memory(first.memory, second.memory)
    for site in ("a", "b"):
        mine, theirs = first.generators[site], second.generators[site]
        assert (mine is not None, theirs is not None) == (switched, switched)
        if mine is None or theirs is None:
            continue
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("switched", [True, False])
def test_the_order_in_which_sites_are_given_does_not_matter(switched: bool) -> None:
    backwards, roomy = dict(reversed(two_sites().items())), method(generator=switched, memory_items=1000)
    assert_same_memory(federate(two_sites(), roomy).memory, federate(backwards, roomy).memory)


@pytest.mark.parametrize("switched", [True, False])
def test_sites_cover_each_others_normals(switched: bool) -> None:
    chosen, sites = method(generator=switched), two_sites()
    together, alone = federate(sites, chosen), federate({"a": sites["a"]}, chosen)
    others_normals = features(6, images=4, seed=7)
    assert distance(together, "a", others_normals) < 0.5 * distance(alone, "a", others_normals)


@pytest.mark.parametrize("switched", [True, False])
def test_a_federation_does_not_hide_what_no_site_has_seen(switched: bool) -> None:
    outcome = federate(two_sites(), method(generator=switched))
    own, unseen = features(0, images=4, seed=8), features(-8, images=4, seed=9)
    assert distance(outcome, "a", unseen) > 3 * distance(outcome, "a", own)


@pytest.mark.parametrize("switched", [True, False])
def test_more_rounds_cover_the_normals_better(switched: bool) -> None:
    fresh = features(0, images=4, seed=7)
    one, three = (
        federate(two_sites(), method(generator=switched, rounds=rounds, memory_items=200)) for rounds in (1, 3)
    )
    assert distance(three, "a", fresh) < distance(one, "a", fresh)


@pytest.mark.parametrize("item_type", ["uint8", "float16"])
def test_one_round_is_the_sites_banks_aggregated_as_they_arrive(item_type: ItemType) -> None:
    chosen = method(rounds=1, item_type=item_type)
    banks = [local_update(source, None, None, chosen, 1).bank for _, source in sorted(two_sites().items())]
    received = [as_received(bank, item_type).placed(number, 2) for number, bank in enumerate(banks)]
    expected = as_received(aggregate(received, 60, chosen.seed).memory, MEMORY_TYPE)
    assert_same_memory(federate(two_sites(), chosen).memory, expected)


def test_a_round_keeps_what_the_memory_had() -> None:
    memory, bank = (local_update(source, None, None, METHOD, 1).bank for source in two_sites().values())
    merged = next_memory(memory, {"a": bank}, ["a"], METHOD).memory
    np.testing.assert_array_equal(merged.items, np.concatenate([memory.items, bank.items]))
    np.testing.assert_array_equal(next_memory(None, {"a": bank}, ["a"], METHOD).memory.items, bank.items)


def small_bank(*places: float) -> MemoryBank:
    items = np.array(places, np.float32)[:, None]
    return MemoryBank(items, np.full((len(items), 1), 3, np.float32), np.zeros(len(items), np.float32))


def test_a_memory_keeps_from_round_to_round_which_site_an_item_comes_from() -> None:
    first = next_memory(None, {"b": small_bank(1), "a": small_bank(0)}, ["a", "b"], METHOD).memory
    assert dict(zip(first.items[:, 0].tolist(), first.weights.tolist(), strict=True)) == {0: [3, 0], 1: [0, 3]}
    second = next_memory(first, {"b": small_bank(2), "c": small_bank(3)}, ["a", "b", "c"], METHOD).memory
    assert dict(zip(second.items[:, 0].tolist(), second.weights.tolist(), strict=True)) == {
        0: [3, 0, 0],
        1: [0, 3, 0],
        2: [0, 3, 0],
        3: [0, 0, 3],
    }


def test_items_that_are_merged_come_from_all_the_sites_behind_them() -> None:
    banks = {"a": small_bank(0, 10), "b": small_bank(0.1, 20)}
    merged = next_memory(None, banks, ["a", "b"], method(memory_items=3)).memory
    places = merged.items[:, 0].round().tolist()
    assert dict(zip(places, merged.weights.tolist(), strict=True)) == {0: [3, 3], 10: [3, 0], 20: [0, 3]}


@pytest.mark.parametrize(("weighted", "place"), [(False, 0.5), (True, 0.1)])
def test_only_where_the_method_says_so_items_count_as_often_as_their_patches(weighted: bool, place: float) -> None:
    heavy = dataclasses.replace(small_bank(0, 1, 9), weights=np.array([[9], [1], [1]], np.float32))
    merged = next_memory(None, {"a": heavy}, ["a"], method(memory_items=2, weighted=weighted)).memory
    assert sorted(merged.items[:, 0].tolist()) == pytest.approx([place, 9])


def test_without_origins_the_memory_does_not_tell_sites_apart() -> None:
    chosen = method(origins=False)
    first = next_memory(None, {"a": small_bank(0), "b": small_bank(1)}, ["a", "b"], chosen).memory
    assert first.weights.tolist() == [[3], [3]]
    assert next_memory(first, {"c": small_bank(2)}, ["a", "b", "c"], chosen).memory.weights.tolist() == [[3]] * 3


def test_origins_can_be_switched_off_between_two_rounds() -> None:
    first = next_memory(None, {"a": small_bank(0), "b": small_bank(1)}, ["a", "b"], METHOD).memory
    second = next_memory(first, {"a": small_bank(2)}, ["a", "b"], method(origins=False)).memory
    assert second.weights.tolist() == [[3]] * 3


def test_the_number_of_origins_is_bounded() -> None:
    sites = [f"site{number:03}" for number in range(MAX_ORIGINS + 2)]
    banks = {site: small_bank(number) for number, site in enumerate(sites)}
    memory = next_memory(None, banks, sites, method(memory_items=1000)).memory
    assert memory.weights.shape == (len(sites), MAX_ORIGINS)
    assert [row.nonzero()[0].tolist() for row in memory.weights[[0, 1, 63, 64, 65]]] == [[0], [1], [63], [0], [1]]


def spread_out(seed: int, size: float = 1) -> MemoryBank:
    """A bank of items that are no noise: what is in one channel goes with what is in the others."""
    rng = np.random.default_rng(seed)
    items = size * rng.gamma(1, 1, (80, 3)) @ rng.normal(size=(3, CHANNELS))
    return MemoryBank(items.astype(np.float32), np.ones((80, 1), np.float32), np.zeros(80, np.float32))


def test_outlying_banks_are_left_out_and_trusted_ones_are_not() -> None:
    roomy, sites = method(memory_items=1000), ["a", "b", "c"]
    first = {site: spread_out(number) for number, site in enumerate(sites)}
    memory = next_memory(None, first, sites, roomy)
    assert memory.outliers == ()
    second = first | {"b": spread_out(1, size=10)}
    without = next_memory(memory.memory, second, sites, roomy)
    assert [each.site for each in without.outliers] == ["b"]
    assert without.memory.patches.sum() == 240 + 160
    assert without.memory.weights.sum(0).tolist() == [160, 80, 160]  # what the memory had stays
    trusted = next_memory(memory.memory, second, sites, roomy, trusted={"b"})
    assert trusted.outliers == ()
    assert trusted.memory.weights.sum(0).tolist() == [160, 160, 160]


def test_the_weights_of_one_site_are_bounded() -> None:
    banks = {site: spread_out(number) for number, site in enumerate("abc")}
    banks["b"] = dataclasses.replace(banks["b"], weights=np.full((80, 1), 1e30, np.float32))
    merged = next_memory(None, banks, ["a", "b", "c"], method(memory_items=1000)).memory
    np.testing.assert_allclose(merged.weights.sum(0), [80, 240, 80], rtol=1e-6)


def test_a_federation_tells_which_banks_were_left_out(caplog: pytest.LogCaptureFixture) -> None:
    sites: dict[str, PatchSource] = {site: PatchArray(features(0, seed=seed)) for seed, site in enumerate("abc")}
    assert federate(sites, METHOD).outliers == ((), ())
    far = sites | {"d": PatchArray(100 * features(0, seed=3))}
    assert [[each.site for each in outliers] for outliers in federate(far, METHOD).outliers] == [["d"], ["d"]]
    first, second = caplog.messages
    assert first.startswith("round 1 leaves the bank of site d out: ")
    assert second.startswith("round 2 leaves the bank of site d out: ")


def test_the_bytes_of_a_bank_are_those_of_the_items_that_it_has() -> None:
    """A site with one image has fewer patches than a bank may have items."""
    sites: dict[str, PatchSource] = {"a": PatchArray(features(0, seed=1)), "b": PatchArray(features(0, 1, seed=2))}
    sent = federate(sites, method(rounds=1)).bytes_sent
    assert sent == {"a": (METHOD.bank_bytes(24, CHANNELS),), "b": (METHOD.bank_bytes(GRID * GRID, CHANNELS),)}


@pytest.mark.parametrize("items", [1, 10, 60])
def test_the_memory_keeps_to_its_size(items: int) -> None:
    assert len(federate(two_sites(), method(memory_items=items, rounds=3)).memory) <= items


def test_every_site_has_its_own_generator() -> None:
    generators = federate(two_sites(), METHOD).generators
    assert sorted(generators) == ["a", "b"]
    a, b = generators["a"], generators["b"]
    assert a is not None
    assert b is not None
    assert not torch.equal(a.outer.weight, b.outer.weight)


def test_without_generator_there_is_none() -> None:
    assert federate(two_sites(), method(generator=False)).generators == {"a": None, "b": None}


def test_without_metric_loss_the_memory_is_that_of_no_generator() -> None:
    assert_same_memory(
        federate(two_sites(), method(metric_loss=False)).memory, federate(two_sites(), method(generator=False)).memory
    )


@pytest.mark.parametrize("switch", ["generator", "metric_loss", "memory_reduce"])
def test_every_switch_changes_the_memory(switch: str) -> None:
    full, without = (federate(two_sites(), method(**{switch: on})).memory for on in (True, False))
    assert full.items.shape != without.items.shape or not np.array_equal(full.items, without.items)


def test_the_seed_changes_the_outcome() -> None:
    assert not np.array_equal(
        federate(two_sites(), METHOD).memory.items, federate(two_sites(), method(seed=1)).memory.items
    )


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("memory_reduce", [True, False])
def test_sites_with_nothing_new_do_not_break_later_rounds(memory_reduce: bool, generator: bool) -> None:
    """As where a site has one image, or where all its images are the same: the memory holds every patch already."""
    few = np.random.default_rng(0).integers(0, 2, (3, GRID * GRID, CHANNELS)).astype(np.float32)
    sites: dict[str, PatchSource] = {"a": PatchArray(few), "b": PatchArray(few[:1])}
    chosen = method(generator=generator, memory_reduce=memory_reduce, bank_items=100, memory_items=1000, rounds=3)
    outcome = federate(sites, chosen)
    assert distance(outcome, "a", few) < 0.1


@pytest.mark.parametrize("generator", [True, False])
def test_a_site_with_one_image_does_not_break_later_rounds(extractor: FeatureExtractor, generator: bool) -> None:
    """Its 784 patches fit into a bank of the default size, so that the memory holds them all after one round."""
    photograph = np.repeat(data.brick()[:224, :224, None], 3, axis=2)
    patches = extractor(extractor.prepare(photograph)[None]).numpy().astype(np.float16)
    outcome = federate({"a": PatchArray(patches)}, Method(generator=generator))
    assert len(outcome.memory) >= 784
    assert distance(outcome, "a", patches.astype(np.float32)) < 1
