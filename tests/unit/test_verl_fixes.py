"""Each fix against the real verl: the fault is there without it and gone with it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

pytestmark = pytest.mark.heavy


def nested_like_transfer_queue(lengths):
    return torch.nested.as_nested_tensor([torch.arange(4 * n).view(4, n) for n in lengths], layout=torch.jagged)


@pytest.mark.parametrize("lengths", [[5, 7, 6], [6, 6, 6], [4, 4], [9]])
def test_position_ids_survive_whatever_the_lengths(lengths):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from medr1_verl import verl_fixes

    verl_fixes.position_ids_of_equal_lengths(tu)
    data = TensorDict({"position_ids": nested_like_transfer_queue(lengths)}, batch_size=[len(lengths)])
    tu.maybe_fix_3d_position_ids(data)
    chosen = tu.index_select_tensor_dict(data, list(range(len(lengths)))[::-1])
    for n, sample in zip(reversed(lengths), chosen["position_ids"].unbind(), strict=True):
        assert torch.equal(sample, torch.arange(4 * n).view(4, n))
