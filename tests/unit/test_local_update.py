"""A site's round: the same for the same arguments, and every switch changes what it should and nothing else."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddymem import patches
from feddymem.distances import nearest_items
from feddymem.generator import MemoryGenerator
from feddymem.local_update import LocalUpdate, local_update, new_generator
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import reduce
from feddymem.method import Method
from feddymem.metric_loss import metric_loss
from feddymem.patches import PatchArray

GRID, CHANNELS = 4, 8
METHOD = Method(generator=True, bank_items=24, memory_items=48)


def features(images: int = 12, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(2, 1, (images, GRID * GRID, CHANNELS)).astype(np.float32)


def source(images: int = 12, seed: int = 0) -> PatchArray:
    return PatchArray(features(images, seed))


def memory(items: int = 30, seed: int = 5) -> MemoryBank:
    return reduce(source(seed=seed), items)


def first(method: Method = METHOD) -> LocalUpdate:
    return local_update(source(), None, None, method, 1)


def second(method: Method = METHOD, **changes: Any) -> LocalUpdate:
    arguments: dict[str, Any] = {"source": source(), "memory": memory(), "generator": None, "round_number": 2}
    return local_update(**(arguments | {"method": method} | changes))


def state(update: LocalUpdate) -> list[torch.Tensor]:
    assert update.generator is not None
    return list(update.generator.state_dict().values())


def assert_same_bank(a: MemoryBank, b: MemoryBank) -> None:
    for name in ("items", "weights", "spreads"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_first_round_trains_nothing() -> None:
    update = first()
    assert update.loss is None
    assert update.generator is not None
    torch.testing.assert_close(
        update.generator(torch.from_numpy(features())), torch.from_numpy(features()), rtol=0, atol=0
    )
    assert_same_bank(update.bank, reduce(source(), 24))


@pytest.mark.parametrize("seed", [0, 2**45, 2**63 - 1])
def test_any_seed_of_a_method_will_do(seed: int) -> None:
    assert first(METHOD.model_copy(update={"seed": seed})).generator is not None


def test_later_rounds_train_the_generator() -> None:
    update = second()
    assert update.loss is not None
    assert math.isfinite(update.loss)
    assert update.generator is not None
    assert bool(update.generator.outer.weight.any())


def test_training_brings_normal_patches_nearer_to_the_memory() -> None:
    known, patch_features = memory(), torch.from_numpy(features())
    generator: MemoryGenerator | None = None
    for round_number in range(2, 12):
        generator = second(generator=generator, memory=known, round_number=round_number).generator
    assert generator is not None
    items = torch.from_numpy(known.items)
    before, _ = nearest_items(patch_features.flatten(0, 1), items)
    after, _ = nearest_items(generator(patch_features).flatten(0, 1), items)
    assert float(after.mean()) < float(before.mean())


def test_the_loss_falls_from_round_to_round() -> None:
    losses, generator = [], None
    for _ in range(8):
        update = second(generator=generator)
        generator = update.generator
        assert update.loss is not None
        losses.append(update.loss)
    assert losses[-1] < losses[0]


def test_a_round_goes_on_from_the_generator_of_the_last() -> None:
    trained = second()
    again = second(generator=trained.generator)
    assert any(not torch.equal(a, b) for a, b in zip(state(trained), state(again), strict=True))


def test_the_generator_of_the_last_round_is_left_as_it_is() -> None:
    """A round that fails must be able to start again from it."""
    generator = new_generator(source(), seed=1)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    second(generator=generator)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())


def test_the_result_is_ready_for_use() -> None:
    generator = second().generator
    assert generator is not None
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_the_bank_is_in_the_space_of_the_trained_generator() -> None:
    update = second()
    assert update.generator is not None
    assert_same_bank(update.bank, reduce(source(), 24, memory(), update.generator))


@pytest.mark.parametrize("global_seed", [1, 2])
def test_the_result_does_not_depend_on_the_state_of_torch(global_seed: int) -> None:
    torch.manual_seed(0)
    reference = second()
    torch.manual_seed(global_seed)
    other = second()
    assert_same_bank(reference.bank, other.bank)
    assert reference.loss == other.loss
    torch.testing.assert_close(state(reference), state(other), rtol=0, atol=0)


def test_the_state_of_torch_is_left_as_it_is() -> None:
    torch.manual_seed(2026)
    before = torch.get_rng_state()
    second()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{"round_number": 3}, {"method": METHOD.model_copy(update={"seed": 1})}])
def test_seed_and_round_vary_the_training(changes: dict[str, Any]) -> None:
    generator = new_generator(source(), seed=1)
    reference, other = second(generator=generator), second(generator=generator, **changes)
    assert any(not torch.equal(a, b) for a, b in zip(state(reference), state(other), strict=True))


@pytest.mark.parametrize("round_number", [1, 2])
def test_without_generator_the_bank_is_made_of_the_features_themselves(round_number: int) -> None:
    known = None if round_number == 1 else memory()
    method = METHOD.model_copy(update={"generator": False})
    update = local_update(source(), known, None, method, round_number)
    assert (update.generator, update.loss) == (None, None)
    assert_same_bank(update.bank, reduce(source(), 24, known))


def test_without_generator_an_old_one_is_dropped() -> None:
    update = second(METHOD.model_copy(update={"generator": False}), generator=new_generator(source(), seed=1))
    assert (update.generator, update.loss) == (None, None)


def test_without_metric_loss_the_generator_stays_the_identity() -> None:
    update = second(METHOD.model_copy(update={"metric_loss": False}))
    assert update.loss is None
    assert update.generator is not None
    assert not update.generator.outer.weight.any()
    assert_same_bank(update.bank, second(METHOD.model_copy(update={"generator": False})).bank)


def test_without_memory_reduce_the_bank_is_a_sample_of_patches() -> None:
    method = METHOD.model_copy(update={"generator": False, "memory_reduce": False})
    bank = second(method).bank
    flat = {tuple(patch) for patch in features().reshape(-1, CHANNELS).tolist()}
    assert len(bank) == 24
    assert all(tuple(item) in flat for item in bank.items.tolist())
    assert not np.array_equal(bank.items, second(method, round_number=3).bank.items)


def test_without_memory_reduce_the_generator_is_trained_all_the_same() -> None:
    torch.testing.assert_close(
        state(second()), state(second(METHOD.model_copy(update={"memory_reduce": False}))), rtol=0, atol=0
    )


@pytest.mark.parametrize("memory_reduce", [True, False])
@pytest.mark.parametrize("count", [1, 5, 500])
def test_the_bank_keeps_to_its_size(count: int, memory_reduce: bool) -> None:
    method = METHOD.model_copy(update={"bank_items": count, "memory_reduce": memory_reduce})
    assert len(first(method).bank) == min(count, 12 * GRID * GRID)
    assert len(second(method).bank) <= count


@pytest.mark.parametrize("items", [1, 2, 3, 4, 6])
def test_a_small_memory_is_enough_to_train_with(items: int) -> None:
    update = second(memory=memory(items))
    assert update.loss is not None
    assert math.isfinite(update.loss)
    assert all(bool(value.isfinite().all()) for value in state(update))


def test_a_memory_that_holds_every_patch_does_not_break_training() -> None:
    """Its distances are all zero, and with them the radius."""
    few = PatchArray(np.ones((3, GRID * GRID, CHANNELS), np.float32))
    update = local_update(few, reduce(few, 24), None, METHOD, 2)
    assert update.loss is None
    assert np.isfinite(update.bank.items).all()


def test_blocks_are_all_trained_on_and_told_of() -> None:
    told = list[tuple[str, int, int]]()
    with mock.patch.object(patches, "BLOCK_BYTES", 5 * GRID * GRID * CHANNELS * 4):
        second(progress=lambda *step: told.append(step))
    assert told == [(what, done, 12) for what in ("generator", "seeds", "averages") for done in (5, 10, 12)]


def test_a_new_generator_is_scaled_to_the_features() -> None:
    assert float(new_generator(PatchArray(features() * 100), seed=0).scale) == pytest.approx(
        100 * float(np.sqrt((features() ** 2).mean())), rel=1e-4
    )


class Steps:
    """What the steps of the training were made of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.images: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.radii: list[float] = []
        self.items: list[torch.Tensor] = []
        forward, loss = MemoryGenerator.forward, metric_loss

        def mapped(generator: MemoryGenerator, images: torch.Tensor) -> torch.Tensor:
            if generator.training:
                self.images.append(images.clone())
            return forward(generator, images)

        def lost(patches: torch.Tensor, items: torch.Tensor, radius: float) -> torch.Tensor:
            assert len(patches) == len(self.images[-1]) * GRID * GRID, "few enough to take them all"
            self.items.append(items)
            self.radii.append(radius)
            found = loss(patches, items, radius)
            self.losses.append(found.item())
            return found

        patch.setattr(MemoryGenerator, "forward", mapped)
        patch.setattr("feddymem.local_update.metric_loss", lost)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Of a source of 12 images in blocks of 5, 5 and 2, each in steps of 4 at most."""
    monkeypatch.setattr(patches, "BLOCK_BYTES", 5 * GRID * GRID * CHANNELS * 4)
    return Steps(monkeypatch)


def test_a_round_trains_on_every_image_once_and_in_an_order_by_chance(steps: Steps) -> None:
    second()
    assert [len(images) for images in steps.images] == [4, 1, 4, 1, 2]
    trained, all_images = torch.cat(steps.images), torch.from_numpy(features())
    order = [int((all_images == image).flatten(1).all(1).nonzero()) for image in trained]
    assert [sorted(order[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert order[:10] != sorted(order[:10])
    steps.images.clear()
    second(round_number=3)
    assert not torch.equal(torch.cat(steps.images), trained)


def test_the_loss_of_a_round_is_the_mean_of_its_steps(steps: Steps) -> None:
    update = second()
    assert len(steps.losses) == len(set(steps.losses)) == 5
    assert update.loss == pytest.approx(sum(steps.losses) / 5)


def test_the_radius_is_that_of_the_patches_before_the_training_and_the_items_are_those_of_the_memory(
    steps: Steps,
) -> None:
    known = memory()
    second(memory=known)
    items = torch.from_numpy(known.items)
    distances, _ = nearest_items(torch.from_numpy(features()[:5]).flatten(0, 1), items)
    assert steps.radii == [pytest.approx(float(distances.quantile(0.5)), rel=1e-4)] * 5
    assert all(torch.equal(each, items) for each in steps.items)


def test_what_the_memory_does_not_ask_for_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites stay in one space: without a metric loss, what a generator does to patches becomes less and less."""
    generator = second().generator
    assert generator is not None
    generator.outer.bias.add_(0.05)
    before = (generator(torch.from_numpy(features())) - torch.from_numpy(features())).square().mean()
    monkeypatch.setattr("feddymem.local_update.metric_loss", lambda mapped, _items, _radius: 0 * mapped.sum())
    for round_number in range(3, 9):
        generator = second(generator=generator, round_number=round_number).generator
        assert generator is not None
    after = (generator(torch.from_numpy(features())) - torch.from_numpy(features())).square().mean()
    assert float(after) < 0.5 * float(before)


def test_a_step_goes_by_its_own_images_and_not_by_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW) -> None:
        gradients = [each.grad for group in optimizer.param_groups for each in group["params"]]
        sizes.append(max(float(gradient.abs().max()) for gradient in gradients if gradient is not None))
        step(optimizer)

    def lost(mapped: torch.Tensor, _items: torch.Tensor, _radius: float) -> torch.Tensor:
        return (0 if sizes else 1000) * mapped.mean()

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr("feddymem.local_update.metric_loss", lost)
    second()
    assert len(sizes) == 3
    assert max(sizes[1:]) < 0.01 * sizes[0]


def test_a_new_generator_is_random_by_its_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first_of, second_of, other = (new_generator(source(), seed).inner for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(first_of, name), getattr(second_of, name))
        assert not torch.equal(getattr(first_of, name), getattr(other, name))


@pytest.mark.parametrize("changes", [{"round_number": 3}, {"method": METHOD.model_copy(update={"seed": 1})}])
def test_a_site_s_first_generator_is_random_by_seed_and_round(changes: dict[str, Any]) -> None:
    method = {"method": METHOD.model_copy(update={"metric_loss": False})}
    reference, other = (second(**{**method, **each}) for each in ({}, changes))
    assert any(not torch.equal(a, b) for a, b in zip(state(reference), state(other), strict=True))
