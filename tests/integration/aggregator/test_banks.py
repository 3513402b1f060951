"""Banks that are taken, refused, or sent again."""

from __future__ import annotations

import dataclasses
import hashlib

import grpc
import numpy as np
import pytest

from feddymem.v1.array_pb2 import DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32
from feddymem.v1.federation_pb2 import UploadBankRequest
from services.runtime.arrays import WireArray, bank_to_wire, chunks, encode
from tests.integration.fake_site import FakeSite, make_bank
from tests.integration.refusals import refused


def broken(name: str, value: float) -> list[WireArray]:
    bank = make_bank()
    arrays = {n: np.array(getattr(bank, n)) for n in ("items", "weights", "spreads")}
    arrays[name].flat[3] = value
    wire = []
    for key, values in arrays.items():
        kind = DATA_TYPE_FLOAT16 if key == "items" else DATA_TYPE_FLOAT32
        data = values.astype("<f2" if key == "items" else "<f4").tobytes()
        array = encode(key, np.ones_like(values), kind)
        array.manifest.sha256 = hashlib.sha256(data).digest()
        wire.append(WireArray(array.manifest, data))
    return wire


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("items", np.nan, "NaN or infinite"),
        ("items", np.inf, "NaN or infinite"),
        ("items", 6.5e4, "float16"),
        ("weights", 0.0, "weight"),
        ("weights", 3e38, "160 patches"),
        ("spreads", -1.0, "spread"),
    ],
)
def test_values_that_no_honest_site_makes_are_refused_and_nothing_is_kept(
    sites: tuple[FakeSite, FakeSite], name: str, value: float, said: str
) -> None:
    arrays = broken(name, value)
    code, text = refused(lambda: sites[0].send(sites[0].header(arrays), arrays))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert said in text
    [damaged] = [array.manifest.sha256 for array in arrays if array.manifest.name == name]
    assert refused(lambda: sites[0].download(damaged))[0] == grpc.StatusCode.NOT_FOUND
    assert sites[0].upload(make_bank())[-1].HasField("accepted")


def test_another_element_type_or_length_is_refused_before_data_moves(sites: tuple[FakeSite, FakeSite]) -> None:
    wide = [encode("items", make_bank(5).items, DATA_TYPE_FLOAT32), *bank_to_wire(make_bank(5), "float16")[1:]]
    code, text = refused(lambda: sites[0].send_raw([UploadBankRequest(header=sites[0].header(wide))]))
    assert (code, "FLOAT32" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    mixed = [bank_to_wire(make_bank(5), "float16")[0], *bank_to_wire(make_bank(6, items=19), "float16")[1:]]
    code, text = refused(lambda: sites[0].send_raw([UploadBankRequest(header=sites[0].header(mixed))]))
    assert (code, "[19, 1]" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_a_bank_of_more_images_than_there_can_be_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(5), "float16")
    header = sites[0].header(arrays)
    header.images = 2**64 - 1
    code, text = refused(lambda: sites[0].send(header, arrays))
    assert (code, "18446744073709551615 images" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    header.images = 10
    sites[0].send(header, arrays)


def test_too_many_items_and_missing_arrays_are_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    code, text = refused(lambda: sites[0].upload(make_bank(items=31)))
    assert (code, "at most 30" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    arrays = bank_to_wire(make_bank(), "float16")[:2]
    code, text = refused(lambda: sites[0].send(sites[0].header(arrays), arrays))
    assert (code, "spreads" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_two_arrays_of_one_hash_are_refused_unless_they_may_be_the_same(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(), "float16")
    header = sites[0].header(arrays)
    header.arrays[2].sha256 = header.arrays[0].sha256
    code, text = refused(lambda: sites[0].send(header, arrays[:2]))
    assert (code, "same sha256" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    bank = make_bank()
    same = dataclasses.replace(bank, weights=np.ones_like(bank.weights), spreads=np.ones_like(bank.spreads))
    assert sites[0].upload(same)[-1].HasField("accepted")


def test_a_bank_of_several_origins_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    """A site speaks for itself alone."""
    code, text = refused(lambda: sites[0].upload(make_bank().placed(0, 2)))
    assert (code, "weights" in text, "[20, 1]" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True, True)


def test_a_bad_checksum_is_data_loss_and_a_second_try_succeeds(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(), "float16")
    requests = [UploadBankRequest(header=sites[0].header(arrays))]
    for array in arrays:
        requests += [UploadBankRequest(chunk=chunk) for chunk in chunks(array.manifest.sha256, array.data)]
    damaged = [UploadBankRequest.FromString(request.SerializeToString()) for request in requests]
    damaged[1].chunk.crc32 ^= 1
    code, text = refused(lambda: sites[0].send_raw(damaged))
    assert (code, "CRC-32" in text) == (grpc.StatusCode.DATA_LOSS, True)
    assert sites[0].send_raw(requests)[-1].HasField("accepted")


def test_an_interrupted_upload_goes_on_at_its_offset(sites: tuple[FakeSite, FakeSite]) -> None:
    arrays = bank_to_wire(make_bank(77), "float16")  # no other test's: arrays are kept by content
    header = UploadBankRequest(header=sites[0].header(arrays))
    items = arrays[0]
    half = len(items.data) // 2
    first = next(chunks(items.manifest.sha256, items.data[:half]))
    code, text = refused(lambda: sites[0].send_raw([header, UploadBankRequest(chunk=first)]))
    assert (code, "items" in text) == (grpc.StatusCode.UNAVAILABLE, True)
    rest = [chunk for a in arrays[1:] for chunk in chunks(a.manifest.sha256, a.data)]
    pieces = [*chunks(items.manifest.sha256, items.data, half), *rest]
    answers = sites[0].send_raw([header, *(UploadBankRequest(chunk=chunk) for chunk in pieces)])
    assert [o.offset for o in answers[0].resume.offsets] == [half, 0, 0]
    assert answers[1].HasField("accepted")


def test_the_same_bank_twice_is_harmless_and_another_one_is_refused(sites: tuple[FakeSite, FakeSite]) -> None:
    sites[0].upload(make_bank(1))
    again = sites[0].upload(make_bank(1))
    sizes = [len(array.data) for array in bank_to_wire(make_bank(1), "float16")]
    assert [o.offset for o in again[0].resume.offsets] == sizes
    assert again[1].HasField("accepted")
    code, text = refused(lambda: sites[0].upload(make_bank(2)))
    assert (code, "'a'" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)
