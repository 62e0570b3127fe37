"""The smallest group of rows is measured on the machine at hand; what a wrong one would do is seen by breaking the product."""

import pytest
import torch

from flexpert.kernels import row_groups
from flexpert.kernels.row_groups import SAFE_ROWS, row_group

PRODUCTS = [(256, 256, False), (128, 256, False), (32, 128, False), (128, 32, True), (64, 96, True)]


@pytest.fixture(autouse=True)
def forget():
    row_groups._row_group.cache_clear()
    yield
    row_groups._row_group.cache_clear()


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_have_the_bits_they_have_among_many(product):
    inner, columns, transposed = product
    group = row_group([product])
    assert group in (4, 8, SAFE_ROWS)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(5, 10 * group, inner, generator=generator)
    stored = torch.randn(5, *((inner, columns) if transposed else (columns, inner)), generator=generator)
    matrices = stored if transposed else stored.transpose(1, 2)
    whole = torch.bmm(rows, matrices)
    for begin in range(0, rows.shape[1], group):
        part = slice(begin, begin + group)
        assert torch.equal(torch.bmm(rows[:, part].contiguous(), matrices), whole[:, part])
        assert torch.equal(rows[2, part] @ matrices[2], whole[2, part])


def test_a_product_whose_bits_depend_on_the_rows_gets_larger_groups(monkeypatch):
    real = torch.bmm

    def unstable_below_eight(rows, matrices):
        result = real(rows, matrices)
        return result * (1 + 1e-6) if rows.shape[1] < 8 else result

    monkeypatch.setattr(torch, "bmm", unstable_below_eight)
    assert row_group(PRODUCTS[:1]) in (8, SAFE_ROWS)
    row_groups._row_group.cache_clear()
    monkeypatch.setattr(torch, "bmm", lambda rows, matrices: real(rows, matrices) + rows.shape[1])
    assert row_group(PRODUCTS[:1]) == SAFE_ROWS


def test_the_largest_group_of_all_products_counts(monkeypatch):
    monkeypatch.setattr(row_groups, "_row_group", lambda inner, *_: {64: 4, 128: 8}[inner])
    assert row_group([(64, 1, False), (128, 1, False)]) == 8
    assert row_group([]) == SAFE_ROWS


def test_products_too_large_to_try_get_the_safe_group():
    assert row_group([(1 << 12, 1 << 12, False)]) == SAFE_ROWS
