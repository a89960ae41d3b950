"""Muon: a step whose direction has no long and no short axis.

The gradient of a weight matrix has a few large singular values, and a plain step follows
these alone. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the
averaged gradient U S V^T by U V^T: every direction moves by the same length.

    B = momentum B + (1 - momentum) G        the average of the gradients G
    M = momentum B + (1 - momentum) G        Nesterov: look ahead once more
    X = M / (1.01 |M|), then three times     X becomes about U V^T
        X = a X + (b A + c A A) X,  A = X X^T
    W = (1 - rate decay) W - rate sqrt(max(1, rows / columns)) X

The last line but one takes every singular value s to a s + b s^3 + c s^5 and leaves U and
V as they are. Jordan uses one polynomial five times, whose slope at 0 is the largest. Polar
Express (Amsel et al. 2025, arXiv 2505.16932) has another one each time: the one that comes
nearest to 1 on all values that are still possible. So three are enough (RESULTS.md). Above
1 they grow fast. Hence the 1.01: rounding in bfloat16 must not take a value there.

It is for the matrices of the blocks. Vectors, embeddings and the head keep AdamW, and so do
the matrices that make shifts, scales and gates: they are the largest, and to orthogonalise
them would cost a third more.
torch.optim.Muon takes one matrix after the other and always works in bfloat16, which a CPU
without AVX512-BF16 does 20 to 30 times slower than float32. Here matrices of one shape are
stacked and taken together, in the type that is asked for.

Shapes: k matrices of one shape, m x n.
"""
import torch

# a, b and c of each time. The first is the best for values from .005 to 1, the next for
# what that one makes of them, and so on. All three bring such values to .5 to 1.5.
POLYNOMIALS = (
    (8.298703, -24.430498, 18.090304),
    (3.915221, -2.921130, 0.559223),
    (3.174604, -2.380433, 0.497826),
)


def orthogonalise(stack, polynomials=POLYNOMIALS, dtype=torch.float32, eps=1e-7):
    """Matrices (k, m, n) with their singular values brought near 1: to .5 to 1.5. Those
    below .005 of their matrix's norm stay smaller."""
    is_tall = stack.shape[1] > stack.shape[2]
    X = (stack.mT if is_tall else stack).to(dtype)
    norm = 1.01 * torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)
    X = X / norm.clamp(min=eps)
    for a, b, c in polynomials:
        gram = X @ X.mT                                                 # A: (k, m, m)
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if is_tall else X).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """The optimizer of the equations above.

    params: matrices. lr: the rate. weight_decay: decay. polynomials: (a, b, c) of each
    time. dtype: the type of X, float32 or bfloat16."""

    def __init__(
        self,
        params,
        lr,
        weight_decay=0.0,
        momentum=0.9,
        polynomials=POLYNOMIALS,
        dtype=torch.float32,
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.polynomials, self.dtype = polynomials, dtype

    @torch.no_grad()
    def step(self):
        """One step of all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for q in group["params"]:
                if q.grad is not None:
                    by_shape.setdefault(q.shape, []).append(q)
            for matrices in by_shape.values():
                self.step_together(
                    matrices, group["lr"], group["weight_decay"], group["momentum"])

    def step_together(self, matrices, lr, weight_decay, momentum):
        """One step of matrices of one shape."""
        rows, columns = matrices[0].shape
        for q in matrices:
            if "momentum_buffer" not in self.state[q]:
                self.state[q]["momentum_buffer"] = torch.zeros_like(q)
        gradients = [q.grad for q in matrices]
        buffers = [self.state[q]["momentum_buffer"] for q in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        update = orthogonalise(torch.stack(ahead), self.polynomials, self.dtype)
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        scale = max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(matrices, list(update.unbind()), alpha=-lr * scale)
