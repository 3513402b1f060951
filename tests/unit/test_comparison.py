"""What the method is compared with: each way against a plain form of itself, and what it claims to send."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddymem import comparison
from feddymem.comparison import CONTENDERS, Sites, alone, average, fedavg, federated, pooled, running_average
from feddymem.generator import MemoryGenerator
from feddymem.method import ItemType, Method
from feddymem.patches import PatchArray
from feddymem.progress import no_progress
from services.runtime.arrays import bank_to_wire

GRID, CHANNELS = 4, 8
METHOD = Method(bank_items=24, memory_items=60)


def features(centre: float, images: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(centre, 1, (images, GRID * GRID, CHANNELS)).astype(np.float32)


@pytest.fixture
def sites() -> Sites:
    return {"a": PatchArray(features(0, 12, seed=1)), "b": PatchArray(features(4, 6, seed=2))}


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_method_gives_every_site_a_detector_and_the_same_again(name: str, sites: Sites) -> None:
    first, second = (CONTENDERS[name].detectors(sites, METHOD, no_progress, "cpu") for _ in range(2))
    assert set(first) == {"a", "b"}
    for site, detector in first.items():
        assert detector.memory.channels == CHANNELS
        assert all(count > 0 for count in detector.bytes_sent)
        assert bool(detector.bytes_sent) == (name != "local")
        np.testing.assert_array_equal(detector.memory.items, second[site].memory.items)


@pytest.mark.parametrize(
    ("name", "made", "trained"),
    [
        ("feddymem", False, False),
        ("local", False, False),
        ("without-generator", False, False),
        ("with-generator", True, True),
        ("without-metric-loss", True, False),
    ],
)
def test_memory_generators_are_made_and_trained_where_a_method_has_them(
    name: str, made: bool, trained: bool, sites: Sites
) -> None:
    for detector in CONTENDERS[name].detectors(sites, METHOD, no_progress, "cpu").values():
        assert (detector.generator is not None) == made
        if detector.generator is not None:
            assert bool(detector.generator.outer.weight.any()) == trained


def test_without_generator_there_is_none_although_the_method_has_them(sites: Sites) -> None:
    method = METHOD.model_copy(update={"generator": True})
    detectors = CONTENDERS["without-generator"].detectors(sites, method, no_progress, "cpu")
    assert [detector.generator for detector in detectors.values()] == [None, None]
    assert all(detector.generator is not None for detector in alone(sites, method).values())


@pytest.mark.parametrize("name", [name for name, contender in CONTENDERS.items() if not contender.seeded])
def test_a_method_said_not_to_depend_on_the_seed_does_not(name: str, sites: Sites) -> None:
    first, second = (
        CONTENDERS[name].detectors(sites, METHOD.model_copy(update={"seed": seed}), no_progress, "cpu")
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first["a"].memory.items, second["a"].memory.items)


@pytest.mark.parametrize("item_type", get_args(ItemType))
def test_a_banks_bytes_are_those_that_the_services_send(item_type: ItemType, sites: Sites) -> None:
    bank = running_average(sites["a"])
    method = Method(item_type=item_type)
    sent = sum(len(array.data) for array in bank_to_wire(bank, item_type))
    assert method.bank_bytes(len(bank), bank.channels) == sent


def test_a_federation_counts_the_bytes_of_every_round(sites: Sites) -> None:
    sent = federated(sites, METHOD)["a"].bytes_sent
    assert len(sent) == METHOD.rounds
    assert sent[0] == METHOD.bank_bytes(METHOD.bank_items, CHANNELS)


@pytest.mark.parametrize(("name", "origins"), [("feddymem", 2), ("without-origins", 1), ("local", 1), ("pooled", 1)])
def test_the_memory_has_an_origin_for_each_site_where_a_method_tells_them_apart(
    name: str, origins: int, sites: Sites
) -> None:
    for detector in CONTENDERS[name].detectors(sites, METHOD, no_progress, "cpu").values():
        assert detector.memory.origins == origins


@pytest.mark.parametrize("name", ["feddymem", "local", "fedavg", "running-average", "without-memory-reduce"])
def test_a_memory_is_rounded_as_on_the_wire(name: str, sites: Sites) -> None:
    items = CONTENDERS[name].detectors(sites, METHOD, no_progress, "cpu")["a"].memory.items
    np.testing.assert_array_equal(items, items.astype(np.float16).astype(np.float32))


def test_pooled_takes_every_patch_in_half_floats(sites: Sites) -> None:
    sent = {name: detector.bytes_sent for name, detector in pooled(sites, METHOD).items()}
    assert sent == {"a": (12 * GRID * GRID * CHANNELS * 2,), "b": (6 * GRID * GRID * CHANNELS * 2,)}


def test_a_site_alone_keeps_as_many_of_its_own_patches_as_it_would_send(sites: Sites) -> None:
    detectors = alone(sites, METHOD)
    for name, detector in detectors.items():
        other = alone({name: sites[name]}, METHOD)[name]
        np.testing.assert_array_equal(detector.memory.items, other.memory.items)
        assert METHOD.bank_items < len(detector.memory) <= METHOD.rounds * METHOD.bank_items


@pytest.mark.parametrize("block", [10**6, 50])
def test_the_pooled_memory_is_a_tenth_of_all_patches(block: int, sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CORESET_BLOCK", block)
    memory = pooled(sites, METHOD)["a"].memory
    patches = np.concatenate([next(iter(site.blocks())).numpy().reshape(-1, CHANNELS) for site in sites.values()])
    assert abs(len(memory) - len(patches) / 10) <= 2
    assert {item.tobytes() for item in memory.items} <= {patch.tobytes() for patch in patches}
    assert (memory.items.mean(1) < 2).any()
    assert (memory.items.mean(1) > 2).any()


def plain_running_average(images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Items and weights, patch by patch."""
    items, weights = images[0].astype(np.float64), np.ones(len(images[0]))
    for image in images[1:]:
        before = items.copy()
        members: dict[int, list[NDArray[np.float32]]] = {}
        for patch in image:
            members.setdefault(int(((before - patch) ** 2).sum(1).argmin()), []).append(patch)
        for item, patches in members.items():
            for patch in patches:
                weights[item] += 1
                items[item] += (patch - items[item]) / weights[item]
    return items, weights


def test_the_running_average_is_that_of_a_plain_loop() -> None:
    images = features(0, 9, seed=3)
    bank = running_average(PatchArray(images))
    items, weights = plain_running_average(images)
    np.testing.assert_allclose(bank.items, items, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(bank.weights, weights[:, None])
    assert bank.weights.sum() == images.shape[0] * images.shape[1]


def test_one_image_is_its_own_running_average() -> None:
    images = features(0, 1, seed=4)
    np.testing.assert_array_equal(running_average(PatchArray(images)).items, images[0])


def test_an_average_generator_has_the_averages_of_all_parameters() -> None:
    generators = [MemoryGenerator(CHANNELS, GRID, scale) for scale in (1.0, 5.0)]
    for number, generator in enumerate(generators):
        for values in generator.parameters():
            torch.nn.init.constant_(values, float(number))
    state = average(generators, [3, 1]).state_dict()
    assert float(state.pop("scale")) == pytest.approx(2.0)
    for values in state.values():
        torch.testing.assert_close(values, torch.full_like(values, 0.25))


def test_federated_averaging_gives_all_sites_one_trained_generator_and_sends_it(sites: Sites) -> None:
    detectors = fedavg(sites, METHOD)
    generator = detectors["a"].generator
    assert generator is not None
    assert generator is detectors["b"].generator
    assert float(generator.outer.weight.abs().max()) > 0
    parameters = sum(values.numel() for values in generator.state_dict().values())
    assert detectors["a"].bytes_sent[0] == 4 * parameters + METHOD.bank_bytes(METHOD.bank_items, CHANNELS)
