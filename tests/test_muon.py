"""Laws of Muon: it is torch's, to rounding; a step has no long and no short axis."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plumbing.muon import POLYNOMIALS, Muon, orthogonalise
from schedules import SCHEDULES
from vit import ViT

JORDAN = 5 * ((3.4445, -4.7750, 2.0315),)       # five times the same, as in torch.optim.Muon
sides = st.integers(2, 40)


def test_each_polynomial_is_the_best_one_for_what_is_left():
    """Chebyshev: with three coefficients the best one errs as much at four places, by
    turns. The next one begins with what these errors leave."""
    low, high = 0.005, 1.0
    for a, b, c in POLYNOMIALS:
        s = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * s + b * s**3 + c * s**5 - 1
        largest = error.abs().max()
        extreme = error[error.abs() > 0.999 * largest].sign()
        assert extreme.unique_consecutive().tolist() == [-1, 1, -1, 1]
        low, high = (1 - largest).item(), (1 + largest).item()
    assert 0.5 < low and high < 1.5


@given(k=st.integers(1, 4), m=sides, n=sides, seed=st.integers(0, 99))
def test_singular_values_come_near_one_and_singular_vectors_stay(k, m, n, seed):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(k, m, n, generator=g, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    values = U.mT @ orthogonalise(M, dtype=torch.float64) @ Vh.mT    # in M's own vectors
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert torch.allclose(values, torch.diag_embed(diagonal), atol=1e-8)
    large = S > 0.0051 * S.square().sum(1, keepdim=True).sqrt()
    assert ((diagonal > 0.5) & (diagonal < 1.5))[large].all()


@given(k=st.integers(2, 4), m=sides, n=sides, seed=st.integers(0, 99))
def test_a_stack_is_its_matrices_one_by_one(k, m, n, seed):
    M = torch.randn(k, m, n, generator=torch.Generator().manual_seed(seed))
    one_by_one = torch.cat([orthogonalise(part[None]) for part in M])
    assert torch.allclose(orthogonalise(M), one_by_one, atol=1e-5)


@given(m=sides, n=sides, seed=st.integers(0, 99))
def test_rounding_takes_no_value_above_the_range_of_the_polynomials(m, n, seed):
    """The one value of a matrix of rank one is its norm: 1 after the division, or a bit
    more."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(1, m, 1, generator=g).sign() * torch.randn(1, 1, n, generator=g)
    values = torch.linalg.svdvals(orthogonalise(M, dtype=torch.bfloat16))
    assert values.max() < 1.55


def test_no_gradient_is_no_direction():
    assert orthogonalise(torch.zeros(1, 3, 4)).abs().max() == 0


def take_steps(build, count=5):
    """A few steps of an optimizer, build(matrices), on fixed gradients. -> the matrices"""
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (24, 8), (8, 8), (8, 32)]
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    optimizer = build(matrices)
    for _ in range(count):
        for q in matrices:
            q.grad = torch.randn(q.shape, generator=g)
        optimizer.step()
    return matrices


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-3), (torch.float32, 2e-2)])
def test_it_is_torchs_muon_to_rounding(dtype, tolerance):
    """torch's works in bfloat16: in float32 the two agree to its rounding."""
    jordans = dict(momentum=0.95, polynomials=JORDAN)
    ours = take_steps(lambda q: Muon(q, lr=0.02, weight_decay=0.1, dtype=dtype, **jordans))
    theirs = take_steps(lambda q: torch.optim.Muon(q, lr=0.02, weight_decay=0.1))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < tolerance


def test_its_state_goes_through_a_checkpoint_bit_for_bit():
    class Interrupted(Muon):
        def step(self):
            self.load_state_dict(self.state_dict())
            super().step()

    straight = take_steps(lambda q: Muon(q, lr=0.02))
    again = take_steps(lambda q: Interrupted(q, lr=0.02))
    assert all(torch.equal(a, b) for a, b in zip(straight, again))


def test_a_matrix_without_a_gradient_stays():
    moves, stays = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moves.grad = torch.eye(4)
    Muon([moves, stays], lr=0.02, weight_decay=0.5).step()
    assert not torch.equal(moves, torch.ones(4, 4)) and torch.equal(stays, torch.ones(4, 4))


@pytest.mark.parametrize("options", [{}, dict(skips=True), dict(decoder=2), dict(economy="defer")])
def test_it_gets_the_matrices_of_the_blocks(options):
    net = ViT(SCHEDULES["ddm"], width=32, depth=4, heads=1, decoder_width=32, **options)
    mine = {id(q) for q in net.block_matrices()}
    inside = {name for name, q in net.named_parameters() if id(q) in mine}
    assert all(name.split(".")[0] in ("blocks", "decoder", "mixer") for name in inside)
    assert not any(".ada." in name or name.endswith("bias") for name in inside)
    wanted = ("qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight", "skip.weight")
    assert inside == {name for name, _ in net.named_parameters() if name.endswith(wanted)}
