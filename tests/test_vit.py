"""Laws of the network: what is dropped cannot be seen, ratio 0 is the plain network.

Shapes depend on no flag."""
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vit
from mask import draw, patchify, unpatchify
from schedules import PREDICTIONS, SCHEDULES
from vit import (
    BLOCKS, ECONOMIES, MODELS, Block, PatchGuess, Places, ViT, attend, positions, rotate,
    route_span, trace_tokens)

VARIANTS = {"plain": {}, "skips": dict(skips=True), "decoder": dict(decoder=2),
            "skips+decoder": dict(skips=True, decoder=1), "classes": dict(classes=3),
            "condition": dict(cond_channels=2), "recompute": dict(checkpoint_blocks=True)}
OTHERS = [e for e in ECONOMIES if e != "drop"]
for name in OTHERS:
    VARIANTS |= {name: dict(economy=name), f"{name}+decoder": dict(economy=name, decoder=1),
                 f"{name}+inputs": dict(economy=name, classes=3, cond_channels=2)}
for name in [b for b in BLOCKS if b != "dit"]:
    VARIANTS |= {f"{name} {more}": dict(block=name) | options for more, options in (
        ("plain", {}), ("skips", dict(skips=True)), ("decoder", dict(decoder=2)),
        *((e, dict(economy=e)) for e in OTHERS),
        *((f"{e}+decoder", dict(economy=e, decoder=1)) for e in OTHERS))}
VARIANTS |= {f"guess {name}": VARIANTS[name] | dict(guess="both")
             for name in ("plain", "decoder", "classes", "condition", *OTHERS,
                          *(f"{e}+decoder" for e in OTHERS))}
every = pytest.mark.parametrize("variant", VARIANTS)
SEES_HIDDEN = {v: ECONOMIES[options.get("economy", "drop")].hidden_seen
               for v, options in VARIANTS.items()}
dropping = pytest.mark.parametrize("variant", [v for v in VARIANTS if not SEES_HIDDEN[v]])
taking_part = pytest.mark.parametrize("variant", [v for v in VARIANTS if SEES_HIDDEN[v]])


def awake(**options):
    """A small network whose zeros have been moved away from zero: every input matters."""
    torch.manual_seed(0)
    small = dict(channels=3, heads_out=2, patch=2, width=32, depth=3, heads=2, decoder_width=32)
    net = ViT(SCHEDULES["ddm"], **small | options)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.05 * torch.randn_like(q))
    if net.guess is not None:
        net.guess.fit(0.2 + torch.randn(500, 12) @ torch.randn(12, 12) / 8)
    return net


def inputs(net, B=2, h=8, w=8):
    g = torch.Generator().manual_seed(1)
    zt, t = torch.randn(B, 3, h, w, generator=g), torch.linspace(0.2, 0.9, B)
    y = torch.arange(B) if net.embed_class is not None else None
    cond = torch.randn(B, 2, h, w, generator=g) if net.embed_cond is not None else None
    return zt, t, y, cond


def pixels(flag, p, h, w):
    """(B, N) token flags -> (B, 1, H, W) pixel flags, by a loop."""
    out = torch.zeros(len(flag), 1, h, w, dtype=torch.bool)
    for b, i in itertools.product(range(len(flag)), range(flag.shape[1])):
        row, column = divmod(i, w // p)
        out[b, 0, row * p:(row + 1) * p, column * p:(column + 1) * p] = flag[b, i]
    return out


def clean_and_spoiled(net):
    """The outputs for an image and for the same one with 99 in its hidden pixels.

    The third value: which pixels are visible."""
    zt, t, y, cond = inputs(net)
    m = draw("patch", 2, 4, 4, 0.6, torch.Generator().manual_seed(0))
    seen = pixels(m.visible, 2, 8, 8)
    spoiled = torch.where(seen, zt, torch.tensor(99.0))
    spoiled_cond = None if cond is None else torch.where(seen, cond, torch.tensor(99.0))
    return net(zt, t, y, m, cond), net(spoiled, t, y, m, spoiled_cond), seen.expand(-1, 6, -1, -1)


@dropping
def test_hidden_pixels_cannot_reach_the_prediction(variant):
    clean, spoiled, _ = clean_and_spoiled(awake(**VARIANTS[variant]))
    assert torch.equal(clean, spoiled)


@taking_part
def test_hidden_pixels_reach_every_prediction_where_the_economy_lets_them_take_part(variant):
    """The other way round: visible places, too, depend on what hidden tokens hold.

    Hidden places have an answer if all are scored."""
    net = awake(**VARIANTS[variant])
    clean, spoiled, seen = clean_and_spoiled(net)
    answered = net.economy.all_scored or net.decoder is not None
    assert (clean != spoiled)[seen].all() and (clean[~seen] != 0).all() == answered


@taking_part
def test_gradients_flow_to_hidden_pixels_where_they_take_part(variant):
    net = awake(**VARIANTS[variant])
    zt, t, y, cond = inputs(net)
    zt.requires_grad_()
    m = draw("patch", 2, 4, 4, 0.6, torch.Generator().manual_seed(0))
    visible = pixels(m.visible, 2, 8, 8).expand(-1, 6, -1, -1)
    net(zt, t, y, m, cond)[visible].square().sum().backward()           # visible answers alone
    assert (zt.grad != 0).all()


def quieten(blocks):
    """Make blocks the identity: their gates shut."""
    for block in blocks:
        for q in block.ada.parameters():
            torch.nn.init.zeros_(q)


def test_a_routed_token_is_what_it_was_and_the_blocks_of_the_route_do_not_see_it():
    """[TREAD] x_k for k not in S is what it was before block i.

    With identities around the route, hidden places are those of a network without blocks,
    whatever the route does. Visible places do not know what hidden tokens hold."""
    net = awake(economy="route", depth=6)
    i, j = route_span(6)
    quieten([*net.blocks[:i], *net.blocks[j:]])
    zt, t, _, _ = inputs(net)
    m = draw("patch", 2, 4, 4, 0.5, torch.Generator().manual_seed(0))
    seen = pixels(m.visible, 2, 8, 8)
    out, spoiled = net(zt, t, None, m), net(torch.where(seen, zt, torch.tensor(99.0)), t, None, m)
    seen = seen.expand(-1, 6, -1, -1)
    assert torch.equal(out[seen], spoiled[seen]) and (out != spoiled)[~seen].all()
    quieten(net.blocks)
    without_blocks = net(zt, t)
    assert torch.equal(out[~seen], without_blocks[~seen]) and (out != without_blocks)[seen].all()


def test_deferred_tokens_are_seen_by_the_mixer_and_by_nothing_else():
    net = awake(economy="defer", depth=6)
    assert len(net.mixer) == 2
    assert len(awake(economy="defer", depth=28).mixer) == 6             # [MicroDiT-XL] 6 for 28
    quieten(net.mixer)
    clean, spoiled, seen = clean_and_spoiled(net)
    assert torch.equal(clean, spoiled) and (clean[~seen] == 0).all()


@pytest.mark.parametrize("depth, expected", [
    (1, (0, 1)), (3, (1, 2)), (6, (1, 5)), (12, (2, 9)), (28, (2, 25))])
def test_the_route_leaves_the_first_two_and_the_last_three_blocks_to_all_tokens(depth, expected):
    assert route_span(depth) == expected


@pytest.mark.parametrize("name", ECONOMIES)
@pytest.mark.parametrize("decoder", [0, 1])
def test_unmasked_an_economy_without_parameters_is_the_plain_network(name, decoder):
    """m = None is the plain network bit for bit, unless the economy owns parameters.

    Then each of them has a say."""
    net, plain = awake(economy=name, decoder=decoder), awake(decoder=decoder)
    zt, t, _, _ = inputs(net)
    own = [key for key in net.state_dict() if key not in plain.state_dict()]
    if not own:
        plain.load_state_dict(net.state_dict())
        assert torch.equal(net(zt, t), plain(zt, t))
    for key in own:
        before = net(zt, t)
        torch.nn.init.normal_(net.get_parameter(key))
        assert not torch.equal(before, net(zt, t)), key


@pytest.mark.parametrize("name", ECONOMIES)
def test_an_economy_builds_its_own_parameters_and_the_network_adds_none_for_it(name):
    """And it describes itself in one line, which --help and the picture show."""
    net, plain, economy = awake(economy=name), awake(), ECONOMIES[name]
    parts = economy.build_parts(3, 32, 32)
    own = {key.partition(".")[0] for key in set(net.state_dict()) - set(plain.state_dict())}
    assert own == set(parts)
    assert type(economy).__doc__ and len(type(economy).__doc__.splitlines()[0]) <= 100


@pytest.mark.parametrize("name", ECONOMIES)
def test_the_picture_shows_what_the_network_does(name):
    """Each block in the picture is given as many tokens as the picture says."""
    m = draw("patch", 1, 4, 4, 0.5, torch.Generator().manual_seed(0))
    counts = trace_tokens(m, 4, 4, depth=6, decoder=1, economy=name)
    assert counts["decoder[0]"] == 16 and set(counts.values()) == {8, 16}
    i, j = route_span(6)
    known = dict(drop=[8] * 6, defer=[8] * 6, route=[8 if i <= k < j else 16 for k in range(6)])
    found = [counts[f"blocks[{k}]"] for k in range(6)]
    assert found == known.get(name, found) and 8 in found


@dropping
def test_no_gradient_flows_to_hidden_pixels(variant):
    net = awake(**VARIANTS[variant])
    zt, t, y, cond = inputs(net)
    zt.requires_grad_()
    m = draw("patch", 2, 4, 4, 0.6, torch.Generator().manual_seed(0))
    net(zt, t, y, m, cond).square().sum().backward()
    seen = pixels(m.visible, 2, 8, 8).expand_as(zt)
    assert (zt.grad[~seen] == 0).all() and (zt.grad[seen] != 0).all()


@every
def test_visible_pixels_do_matter(variant):
    """The other way round: the law above is not true because nothing matters."""
    net = awake(**VARIANTS[variant])
    zt, t, y, cond = inputs(net)
    assert not torch.allclose(net(zt, t, y, None, cond), net(zt + 0.1, t, y, None, cond))
    assert not torch.allclose(net(zt, t, y, None, cond), net(zt, t * 0.5, y, None, cond))
    if y is not None:
        assert not torch.allclose(net(zt, t, y, None, cond), net(zt, t, 1 - y, None, cond))
        unlabelled = net(zt, t, -torch.ones_like(y), None, cond)
        assert torch.equal(unlabelled, net(zt, t, None, None, cond))
    if cond is not None:
        assert not torch.allclose(net(zt, t, y, None, cond), net(zt, t, y, None, cond + 0.1))


@every
def test_the_output_is_an_image_and_hidden_places_are_zero_without_a_decoder(variant):
    net = awake(**VARIANTS[variant])
    zt, t, y, cond = inputs(net, h=8, w=12)
    for m in (None, draw("block", 2, 4, 6, 0.5, torch.Generator().manual_seed(0), block=2)):
        out = net(zt, t, y, m, cond)
        assert out.shape == (2, 6, 8, 12) and out.dtype == torch.float32
        if m is not None:
            hidden = ~pixels(m.visible, 2, 8, 12).expand_as(out)
            assert (out[hidden] == 0).all() == (net.decoder is None and not net.economy.all_scored)


@every
def test_a_mask_that_hides_nothing_is_the_unmasked_network(variant):
    from mask import Mask
    net = awake(**VARIANTS[variant])
    zt, t, y, cond = inputs(net)
    assert draw("patch", 2, 4, 4, 0.0) is None
    all_visible = Mask(torch.arange(16).expand(2, -1), 16)
    assert torch.equal(net(zt, t, y, None, cond), net(zt, t, y, all_visible, cond))


def test_a_token_keeps_its_position_when_others_are_dropped():
    """Equal patches at other places give other predictions."""
    from mask import Mask
    net = awake()
    zt = torch.ones(1, 3, 8, 8)
    here, there = (net(zt, torch.tensor([0.5]), None, Mask(torch.tensor([[i]]), 16))
                   for i in (0, 9))
    assert not torch.allclose(here[:, :, :2, :2], there[:, :, 4:6, 2:4])


def test_hidden_tokens_differ_by_their_position_in_the_decoder():
    from mask import Mask
    net = awake(decoder=1)
    out = net(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), None, Mask(torch.tensor([[0, 1]]), 16))
    assert not torch.allclose(out[0, :, 4:6, 4:6], out[0, :, 6:8, 6:8])


def test_long_skips_carry_the_first_half_into_the_second():
    block = awake(skips=True).blocks[-1]
    u, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    assert not torch.allclose(block(u, c, torch.randn_like(u)), block(u, c, torch.randn_like(u)))


@pytest.mark.parametrize("depth", range(1, 8))
def test_a_long_skip_joins_blocks_that_lie_as_far_from_the_ends_and_are_not_neighbours(depth):
    """[U-ViT] block i feeds block depth - 1 - i.

    Of two neighbours the second would be given its own input twice."""
    net, outputs, joined = awake(skips=True, depth=depth), [], {}
    for number, block in enumerate(net.blocks):
        def look(module, given, out, number=number):
            if module.skip is not None:
                joined[number] = [i for i, u in enumerate(outputs) if torch.equal(u, given[2])]
                assert not torch.equal(given[0], given[2])
            outputs.append(out)
        block.register_forward_hook(look)
    net(torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6]))
    assert joined == {depth - 1 - i: [i] for i in range((depth - 1) // 2)}


def test_positions_are_distinct_and_fixed():
    u = positions(16, 16, 64, torch.device("cpu"))
    assert u.shape == (256, 64) and torch.cdist(u, u).add(torch.eye(256) * 9).min() > 0.1
    rows = u.view(16, 16, 64)[3, :, 32:]                                # second half: the row
    assert torch.equal(rows, rows[:1].expand(16, -1))


def test_turned_vectors_meet_at_an_angle_that_depends_on_the_distance_alone():
    """[RoPE] q_i . k_j is the same for all pairs of tokens that lie equally far apart, and
    turning keeps lengths."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g, dtype=torch.float64).expand(2, 1, 1, 20, 16)
    turns = Places(4, 5, torch.device("cpu")).turns(16).double()
    turned = rotate(q, turns)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1))
    products = (turned @ rotate(k, turns).mT)[0, 0].view(4, 5, 4, 5)
    assert torch.allclose(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:], atol=1e-5)
    flat = products[0, 0].flatten()
    assert len(flat) == len({round(value, 6) for value in flat.tolist()})       # all differ


def test_a_masks_turns_are_those_of_its_tokens():
    m = draw("patch", 2, 4, 4, 0.5, torch.Generator().manual_seed(0))
    everywhere = Places(4, 4, torch.device("cpu"))
    for b in range(2):
        picked = everywhere.of(m).turns(8)[b, 0]
        assert torch.equal(picked, everywhere.turns(8)[m.keep[b]])


def test_attention_of_a_rotary_block_knows_no_length_of_queries_and_keys():
    """[QK-norm] ten times larger weights of queries and keys change nothing."""
    block = BLOCKS["rotary"](32, 2, 32)
    turns = Places(2, 3, torch.device("cpu")).turns(16)
    u = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    before = block.attention(u, turns)
    with torch.no_grad():
        block.qkv.weight[:64] *= 10
        block.qkv.bias[:64] *= 10
    assert torch.allclose(block.attention(u, turns), before, atol=1e-4)


def test_attention_is_softmax_of_scaled_products():
    block = Block(8, 2, 8)
    u = torch.randn(2, 5, 8)
    q, k, v = block.qkv(u).chunk(3, -1)
    heads = []
    for i in range(2):
        a, b, c = (x[..., 4 * i:4 * i + 4] for x in (q, k, v))
        heads.append((a @ b.transpose(1, 2) / 2).softmax(-1) @ c)
    assert torch.allclose(block.attention(u), block.out(torch.cat(heads, -1)), atol=1e-6)


def test_both_ways_to_attend_agree():
    q, k, v = torch.randn(3, 2, 4, 26, 16).unbind(0)
    expected = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v), expected, atol=1e-5)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert torch.allclose(half, expected, atol=0.05)


def test_every_branch_starts_at_zero():
    net = ViT(SCHEDULES["ddm"], heads_out=1, width=32, depth=4, heads=2, skips=True, decoder=1,
              decoder_width=32)
    u, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    assert torch.equal(net.blocks[0](u, c), u)
    assert torch.allclose(net.blocks[-1](u, c, torch.randn_like(u)), u, atol=1e-6)
    assert (net(torch.randn(2, 3, 16, 16), torch.tensor([0.5, 0.1])) == 0).all()


@pytest.mark.parametrize("economy", ECONOMIES)
@pytest.mark.parametrize("decoder", [0, 1])
def test_the_head_sees_the_image_from_the_start(decoder, economy):
    """Only the head may start at zero on the way from the image to the output. Two layers
    that do wait for each other: the first has nothing to tell, the second passes nothing
    back."""
    net = ViT(SCHEDULES["ddm"], width=32, depth=2, heads=2, decoder=decoder, decoder_width=32,
              skips=ECONOMIES[economy].skips, economy=economy)
    torch.nn.init.normal_(net.head.weight, std=32 ** -0.5)
    t, m = torch.full((2,), 0.5), draw("patch", 2, 4, 4, 0.5, torch.Generator().manual_seed(0))
    a, b = (net(x, t, m=m) for x in torch.randn(2, 2, 3, 16, 16))
    seen = unpatchify(m.visible[:, :, None].expand(-1, -1, 48), 4, 4, 4)
    assert (a - b)[seen].std() > 0.1 * a[seen].std()


@pytest.mark.parametrize("economy", ECONOMIES)
@pytest.mark.parametrize("decoder", [0, 1])
def test_gradients_first_reach_each_part_at_the_stated_step(decoder, economy):
    torch.manual_seed(0)
    net = ViT(SCHEDULES["ddm"], heads_out=1, width=32, depth=2, heads=2, decoder=decoder,
              skips=ECONOMIES[economy].skips, decoder_width=32, classes=2, economy=economy)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    m = draw("patch", 4, 4, 4, 0.5, torch.Generator().manual_seed(0))
    first = {}
    for step in range(4):
        optimizer.zero_grad()
        out = net(torch.randn(4, 3, 16, 16), torch.rand(4), torch.arange(4) % 2, m)
        F.mse_loss(out, torch.ones(4, 3, 16, 16)).backward()
        optimizer.step()
        for name, q in net.named_parameters():
            if q.grad is not None and q.grad.abs().sum() > 0:
                first.setdefault(name, step)
    unreached = {name for name, _ in net.named_parameters()} - set(first)
    # where nothing was dropped the mask token is there, but times 0
    assert unreached == ({"mask_token"} if decoder and net.economy.all_scored else set())
    assert first["head.weight"] == 0
    assert first["embed.weight"] == first["blocks.0.ada.weight"] == 1
    assert first["blocks.0.qkv.weight"] == 2 == max(first.values())
    if decoder:
        assert first["connect.weight"] == first["decoder.0.ada.weight"] == 1
        assert first["decoder.0.qkv.weight"] == 2


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_guess_is_the_best_linear_one_and_leaves_a_rest_of_variance_1(name, predict):
    """On data and noise whose covariance is known exactly: n orthogonal columns.

    What the guess leaves is not correlated with the patch. With the true rest it is the
    target, whatever the prediction; DDM's slopes stay as they are."""
    torch.manual_seed(0)
    n, P, schedule = 4000, 12, SCHEDULES[name]
    free = torch.randn(n, 2 * P, dtype=torch.float64)
    exact = torch.linalg.qr(free - free.mean(0)).Q * n ** 0.5
    exact = exact - exact.mean(0)
    mixed = torch.eye(P) + torch.randn(P, P, dtype=torch.float64) / 8
    x0 = (exact[:, :P] @ mixed / 3 + 0.2).float()[None]
    eps = exact[:, P:].float()[None]
    guess, t = PatchGuess(schedule, predict, 4, 3), torch.tensor([0.6])
    guess.fit(x0[0])
    a, b = guess.coefficients(t)
    w = guess.whiten(a * x0 + b * eps, t)
    along = (x0 - guess.mean) @ guess.axes / guess.spread
    angle = torch.atan2(b, a * guess.spread)
    f = (along - angle.cos() * w) / angle.sin()
    for part in (w, f):
        assert torch.allclose(part[0].T @ part[0] / n, torch.eye(P), atol=5e-3)
    assert (w[0].T @ f[0] / n).abs().max() < 5e-3
    heads, slopes = PREDICTIONS[predict].heads, torch.randn(1, n, len(schedule.slopes) * P)
    parts = [f] * heads + list(slopes.split(P, -1) if schedule.slopes else ())
    out = guess.complete(as_heads(parts), w, t)
    wanted = PREDICTIONS[predict].target(x0, eps, a, b, schedule)
    assert torch.allclose(out, as_heads([*wanted, *parts[heads:]]), atol=2e-4, rtol=1e-4)


def as_heads(fields):
    """Fields (B, K, P) of 3 channels, as the head of a network gives them."""
    return torch.stack([field.unflatten(-1, (-1, 3)) for field in fields], -2).flatten(-3)


def test_a_new_network_with_a_guess_answers_the_guess():
    """Its head is zero. Without one it answers zero."""
    options = dict(channels=3, heads_out=2, patch=2, width=32, depth=3, heads=2)
    net = ViT(SCHEDULES["ddm"], guess="both", **options)
    net.guess.fit(0.2 + torch.randn(500, 12) @ torch.randn(12, 12) / 8)
    zt, t, _, _ = inputs(net)
    x = patchify(zt, 2)
    rest = torch.zeros(2, 16, 24)
    wanted = net.guess.complete(rest, net.guess.whiten(x, t), t)
    assert torch.equal(net(zt, t), unpatchify(wanted, 2, 4, 4)) and (wanted != 0).all()
    assert (ViT(SCHEDULES["ddm"], **options)(zt, t) == 0).all()


def test_few_patches_leave_no_axis_empty():
    """Two patches span one direction; what they do not show may still be."""
    guess = PatchGuess(SCHEDULES["ddm"], "unit", 4, 3)
    guess.fit(torch.stack([torch.zeros(12), torch.ones(12)]))
    assert guess.spread.min() > 0.1 and guess.spread.max() < 2
    guess.fit(torch.zeros(5, 12))                           # all of one colour
    assert guess.spread.min() > 0 and torch.isfinite(guess.axes).all()
    single = PatchGuess(SCHEDULES["ddm"], "unit", 1, 1)
    single.fit(torch.tensor([[0.0], [2.0], [4.0]]))         # a patch may be one value
    assert single.spread.item() == pytest.approx((8 / 3) ** 0.5)


SPLITS = [(e, d, s, name)
          for e, d, s, name in itertools.product([1, 2, 3], [0, 1, 3], [False, True], ECONOMIES)
          if not s or ECONOMIES[name].skips]


@pytest.mark.parametrize("encoder, decoder, skips, economy", SPLITS)
def test_any_split_builds_and_a_masked_model_runs_unmasked(encoder, decoder, skips, economy):
    net = ViT(SCHEDULES["ddm"], width=32, depth=encoder, heads=2, decoder=decoder, decoder_width=32,
              skips=skips, economy=economy)
    zt, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    m = draw("patch", 2, 4, 4, 0.9, torch.Generator().manual_seed(0))
    assert net(zt, t, None, m).shape == net(zt, t).shape


def test_recomputing_blocks_changes_no_gradient():
    one, two = awake(), awake(checkpoint_blocks=True)
    zt, t, _, _ = inputs(one)
    for net in (one, two):
        net(zt, t).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_size_can_be_built(name):
    """Heads share the width, a place is four coordinates, light blocks have heads of 32.

    The four are sine and cosine of row and column."""
    size = MODELS[name]
    assert size["width"] % size["heads"] == 0 == size["width"] % 4
    assert size["decoder_width"] % 32 == 0 and size["depth"] > 0


@pytest.mark.parametrize("name, ours, published", [
    ("tiny", 4.2, None), ("small", 32.5, 33), ("base", 129.5, 130), ("large", 456.8, 458),
    ("xl", 673.7, 675)])
def test_the_sizes_in_the_comments_are_counted(name, ours, published):
    """Ours without classes; DiT's with 1001 of them, a second output for the variance and
    256 fixed positions, as its table counts."""
    def count(**options):
        with torch.device("meta"):
            net = ViT(SCHEDULES["edm"], channels=4, patch=2, **options, **MODELS[name])
        return sum(q.numel() for q in net.parameters()) / 1e6

    assert count() == pytest.approx(ours, abs=0.05)
    source = Path(vit.__file__).read_text()
    line = next(line for line in source.splitlines() if line.startswith(f'    "{name}": dict('))
    assert f"# {ours} M" in line
    if published:
        fixed = 256 * MODELS[name]["width"] / 1e6
        assert count(heads_out=2, classes=1001) + fixed == pytest.approx(published, abs=0.52)


@pytest.mark.parametrize("name, millions", [("tiny", 4.2), ("small", 32.6), ("base", 129.8)])
def test_sizes_are_as_stated(name, millions):
    with torch.device("meta"):
        net = ViT(SCHEDULES["ddm"], channels=3, patch=4, **MODELS[name])
    assert sum(q.numel() for q in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
