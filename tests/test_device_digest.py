"""The checksum that is computed where tensors lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import xxhash
from torch import Tensor

from uniapl import device_digest
from uniapl.device_digest import DeviceDigest

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.int64)


def digest(*tensors: Tensor) -> str:
    found = DeviceDigest()
    for tensor in tensors:
        found.add(tensor)
    return found.hexdigest()


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.randint(-(2**62), 2**62, shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype) if dtype in (torch.uint8, torch.int64) else (values / 2**62).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_views_of_the_same_bytes_have_the_same(dtype: torch.dtype) -> None:
    tensor = some(dtype, 6, 5)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda bytes_: bytes_.__setitem__(3, bytes_[3] ^ 1),
        lambda bytes_: bytes_.__setitem__(-1, bytes_[-1] ^ 128),
        lambda bytes_: bytes_.__setitem__(slice(None), bytes_.roll(8)),
    ],
    ids=["a bit of the first word", "the last bit", "words in another order"],
)
def test_any_change_changes_it(dtype: torch.dtype, change: Callable[[Tensor], None]) -> None:
    tensor = some(dtype, 6, 5)
    before = digest(tensor)
    change(tensor.view(-1).view(torch.uint8))
    assert digest(tensor) != before


def test_the_order_of_tensors_counts() -> None:
    a, b = some(torch.float32, 4), some(torch.float32, 3)
    assert digest(a, b) != digest(b, a)


def test_one_tensor_by_hand() -> None:
    total = torch.tensor([5 + 7 + 11, 1 * 5 + 2 * 7 + 3 * 11])
    assert digest(torch.tensor([5, 7, 11])) == xxhash.xxh3_64_hexdigest(total.numpy().tobytes())


def test_a_large_tensor_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of 64 words, not of four million, so that a small tensor has several."""
    tensor = some(torch.bfloat16, 7, 100)
    whole = digest(tensor)
    monkeypatch.setattr(device_digest, "WORDS", 64)
    assert digest(tensor) == whole


def test_of_nothing_there_is_one_too() -> None:
    assert digest() == digest()
    assert digest(torch.empty(0)) != digest()
