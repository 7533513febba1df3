"""Questions about a call, answered from masks and positions."""

import pytest
import torch

from think_compile.kernels import answers


def causal(n, extent, start):
    return (torch.arange(extent) <= torch.arange(start, start + n)[:, None])[None, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_hides_other_rows(dtype):
    def mask(allowed):
        return allowed if dtype == torch.bool else torch.where(allowed, 0, torch.finfo(dtype).min).to(dtype)

    allowed = causal(5, 12, 0)
    assert answers.hides_other_rows(mask(allowed))
    assert answers.hides_other_rows(mask(allowed[..., :5]))
    for row, column in [(0, 5), (4, 11)]:
        more = allowed.clone()
        more[..., row, column] = True
        assert not answers.hides_other_rows(mask(more))
    blind = allowed.clone()
    blind[..., 2, :] = False
    assert answers.hides_other_rows(mask(blind)) == (dtype == torch.bool)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_sees_later_rows(dtype):
    def sees(allowed, start, n_new):
        mask = allowed if dtype == torch.bool else torch.where(allowed, 0.0, torch.finfo(dtype).min)
        return {bool(answers.sees_later_rows(mask, at, n_new)) for at in (start, torch.tensor(start), first + start)}

    first, allowed = torch.arange(3), causal(3, 12, 4)
    assert sees(allowed, 4, 3) == {False}
    assert sees(allowed, 4, 2) == sees(allowed, 3, 3) == {True}
    allowed[..., 1, 11] = True
    assert sees(allowed, 4, 3) == {True} and sees(allowed, 9, 3) == {False}


def test_reads_later_rows():
    for start in (4, torch.tensor(4), torch.arange(4, 7)):
        assert answers.reads_later_rows(8, start, 3)
        assert not answers.reads_later_rows(7, start, 3)


def test_begins_at_first_row():
    for start in (0, torch.tensor(0), torch.arange(4)):
        assert answers.begins_at_first_row(start, True)
        assert answers.begins_at_first_row(start, False)
    for start in (2, torch.tensor(2), torch.arange(1, 4)):
        assert not answers.begins_at_first_row(start, True)
        assert not answers.begins_at_first_row(start, False)
    assert not answers.begins_at_first_row(torch.tensor([0, 1, 3]), False)


def test_all_hold():
    yes, no = torch.tensor(True), torch.tensor(False)
    assert answers.all_hold([yes, True]) and answers.all_hold([True]) and answers.all_hold([yes, yes])
    assert not answers.all_hold([yes, no]) and not answers.all_hold([yes, False]) and not answers.all_hold([False, no])


def test_answers_of_layers_on_different_devices():
    given = [torch.tensor(True, device="meta"), torch.tensor(True)]
    assert all(together(given).device.type == "meta" for together in (answers.all_hold, answers.any_holds))
