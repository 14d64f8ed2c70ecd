"""Where there is no GPU, one visible skip stands for the contract that a GPU would have kept."""

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: the Triton kernels were checked in the interpreter only",
)
def test_the_contract_is_collected_for_the_gpu(request):
    collected = {item.path.parent.name for item in request.session.items}
    if len(request.session.items) > 1:
        assert "contract" in collected
