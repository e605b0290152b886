"""The backward in steps gives what autograd gives, also where x comes late and the forward saved too little."""

import pytest
import torch

from megasparse.mlp import MainGrads, sparse_mlp
from megasparse.mlp.call import prepare, run_forward
from megasparse.mlp.steps import BackwardCall, BackwardSteps
from tests.mlp.patterns import Case, make_case

L1_WEIGHT = 0.37
TOKENS, SEQUENCES = 512, 2
CAPACITIES = [0, 40, TOKENS * 70]
"""Of the saved buffers: nothing fits, a part, everything."""


def by_autograd(case: Case, main: MainGrads | None, **options: object) -> list[torch.Tensor]:
    """dx, dw_in, dw_down (or `main`)."""
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, sequences=SEQUENCES, main_grads=main, **options)
    torch.autograd.backward([out.y, out.l1], [case.dy, torch.tensor(L1_WEIGHT, device=x.device).to(out.l1.dtype)])
    return [x.grad, *(main if main is not None else (w_in.grad, w_down.grad))]


def by_steps(case: Case, main: MainGrads | None, late: bool, **options: object) -> list[torch.Tensor]:
    x, w_in, w_down = case[:3]
    mask, order = options.get("token_mask"), options.get("order")
    call = prepare(x, w_in, w_down, mask, SEQUENCES, options["path"], order, options["capacity"], main)
    _, l1, _, _, _, *saved = run_forward(call, w_in, w_down, True)
    dl1 = torch.tensor(L1_WEIGHT, device=x.device).to(l1.dtype)
    steps = BackwardSteps(
        BackwardCall(case.dy, dl1, w_in, w_down, call.token_mask, order, call.sequences, call.path, saved)
    )
    arriving = torch.full_like(call.tokens, torch.nan)  # what a buffer holds before a gather into it is done
    dx = steps.input_gradient(None if late else call.tokens)
    if late:
        arriving.copy_(call.tokens)
        steps.complete_input_gradient(arriving)
    dw_in, dw_down = steps.weight_gradients(call.tokens, main)
    if main is not None:
        assert dw_in is None
        assert dw_down is None
        return [dx, *main]
    return [dx, dw_in, dw_down]


def check(case: Case, path: str, late: bool, accumulate: bool, masked: bool, capacity: int) -> None:
    """Bit by bit."""
    device = case.x.device
    generator = torch.Generator().manual_seed(1)
    options = {
        "path": path,
        "capacity": capacity,
        "token_mask": (torch.rand(TOKENS, generator=generator) > 0.3).to(device) if masked else None,
        "order": torch.randperm(case.hidden, generator=generator).int().to(device) if masked else None,
    }
    wide = torch.float64 if case.x.dtype == torch.float64 else torch.float32

    def buffers() -> MainGrads | None:
        if not accumulate:
            return None
        return MainGrads(*(torch.ones(weight.shape, dtype=wide, device=device) for weight in case[1:3]))

    expected = by_autograd(case, buffers(), **options)
    for value, wanted in zip(by_steps(case, buffers(), late, **options), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("path", "capacity"), [("dense", 0), *(("sparse", capacity) for capacity in CAPACITIES)])
def test_steps_are_autograd(path: str, capacity: int, late: bool, gated: bool, accumulate: bool, masked: bool) -> None:
    check(make_case(TOKENS, 24, 70, gated, "sparse"), path, late, accumulate, masked, capacity)


def test_late_input_is_needed_where_values_are_missing() -> None:
    """Otherwise the test above would prove nothing about `complete_input_gradient`."""
    x, w_in, w_down, dy = make_case(TOKENS, 24, 70, True, "sparse")[:4]
    for capacity, missing in ((40, True), (TOKENS * 70, False)):
        call = prepare(x, w_in, w_down, None, SEQUENCES, "sparse", None, capacity, None)
        saved = run_forward(call, w_in, w_down, True)[5:]
        steps = BackwardSteps(BackwardCall(dy, None, w_in, w_down, None, None, SEQUENCES, "sparse", saved))
        assert bool(steps.input_gradient(None).isnan().any()) is missing
