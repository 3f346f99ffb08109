"Walks: their ends are what `generate` draws, they close, and their maps are those of the network"
import numpy as np, pytest, torch
from PIL import Image
from sagan.attention import attention_maps
from sagan.data import to_bytes
from sagan.networks import generate
from sagan.reports import seeded_latents
from sagan.runs import load_run
from sagan.walks import draw_walk, mixed_classes, slerp, walk_frames, walk_path, walk_run, walk_strip
from test_sampling import made


@pytest.fixture(scope='module')
def G(): return load_run('digits').model.ema


def test_slerp():
    "The ends exactly, between them a steady angle and length; also for latents on one line"
    a, b = seeded_latents(2, 128, 1)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    a, b = a/a.norm(), b/b.norm()
    quarter, half = slerp(a, b, .25), slerp(a, b, .5)
    def angle(u, v): return torch.cosine_similarity(u.double(), v.double(), 0).acos()
    assert torch.allclose(angle(a, quarter)*4, angle(a, b), rtol=1e-4)
    assert torch.allclose(angle(a, half), angle(half, b), rtol=1e-4) and abs(quarter.norm() - 1) < 1e-5
    many = slerp(torch.stack([a, b, a]), torch.stack([b, a, a]), .3)
    assert torch.allclose(many[2], a) and torch.allclose(many[0], slerp(a, b, .3))
    one = torch.ones(1)
    assert torch.allclose(slerp(a, -a, .25), a/2) and slerp(one, -one, .5).isfinite().all()


@pytest.mark.parametrize('closed', [True, False])
def test_stops_are_what_generate_draws(G, closed):
    "Image 0 of each class under each seed; a closed walk comes from its last stop back to the first"
    seeds, labels, frames = [5, 2, 9], [3, 8, 1], 4
    z = walk_path(torch.cat([seeded_latents(1, 128, s) for s in seeds]), frames, closed, slerp)
    weights = walk_path(torch.eye(10)[labels], frames, closed)
    assert len(z) == len(weights) == (12 if closed else 9)
    assert torch.allclose(weights.sum(1), torch.ones(len(z)))
    x, maps, point = draw_walk(G, z, weights)
    for k, (s, c) in enumerate(zip(seeds, labels)):
        end = generate(G, torch.tensor([c]), seed=s)[0]
        assert torch.allclose(x[k*frames], end, atol=1e-4)
        assert (to_bytes(x[k*frames]).int() - to_bytes(end).int()).abs().max() <= 1
    if not closed: return
    step = (x[1:] - x[:-1]).abs().mean((1, 2, 3))
    assert (x[0] - x[-1]).abs().mean() < 3*step.mean()


def test_halfway_between_classes(G):
    "The means of gains and biases, whatever the labels; afterwards the network is as before"
    z, y = seeded_latents(2, 128), torch.tensor([0, 9])
    weights = torch.tensor([[.5] + [0.]*7 + [.5, 0]]*2)
    with torch.no_grad():
        before = G(z, y)
        with mixed_classes(G, weights): mixed = G(z, y)
        assert torch.equal(G(z, y), before)
    means = load_run('digits').model.ema
    for name, p in means.named_parameters():
        if name.endswith(('gain.weight', 'bias.weight')): p.data[:] = p[[0, 8]].mean(0)
    with torch.no_grad(): assert torch.allclose(mixed, means(z, y), atol=1e-5)
    with pytest.raises(ValueError, match='weights must have shape'):
        with mixed_classes(G, weights[:, :3]): pass


def test_maps(G):
    "Those of `attention_maps` at the point, in multiples of the uniform weight; with the network in any mode"
    z, y = seeded_latents(3, 128, 4), torch.tensor([3, 3, 3])
    with torch.no_grad(): _, (m,) = attention_maps(G, z, y)
    x, maps, point = draw_walk(G.train(), z, torch.eye(10)[y], 16, (20, 7))
    assert G.training and point == (20, 7)
    assert torch.allclose(maps, m.on_image(20, 7)*m.k.shape[1], atol=1e-4)
    G.eval()


def test_runs_of_all_kinds(tmp_path):
    "Without classes at 64 pixels, with one class, without attention; in each kind of file"
    free = made(tmp_path, size=64, g_attention=(8, 16))
    file = walk_run(free, range(2), frames=2, layer=8, point=(60, 3))
    assert file == tmp_path/'walk-seeds0,1-layer8-frames2-point60,3.gif'
    with Image.open(file) as im: assert (im.n_frames, im.info['loop'], im.info['duration']) == (4, 0, 80)
    again = walk_run(free, [0, 1, 0], frames=2)
    assert again == tmp_path/'walk-seeds0,1,0-frames2.gif'
    one = made(tmp_path, 1, g_attention=(16,))
    with Image.open(walk_run(one, [4, 7], 'c0', 2, tmp_path/'a.webp')) as im: assert im.n_frames == 4
    plain = made(tmp_path, 3, g_attention=())
    wide = Image.open(walk_run(plain, classes=[0, 2], frames=2, out=tmp_path/'a.PNG'))
    assert wide.width > 2*wide.height
    assert walk_run(plain, 0, [0, 2], 2).name == 'walk-seeds0-classes0,2-frames2.gif'
    with pytest.raises(ValueError, match='no attention to show'): walk_run(plain, point=(1, 1))
    default = {file.name, again.name, 'walk-seeds0-classes0,2-frames2.gif'}
    assert {f.name for f in tmp_path.iterdir()} == default | {'a.webp', 'a.PNG'}


def test_frames_share_one_scale():
    "The same weight has the same color in every frame, however strong the others are; and in the strip"
    x, maps = torch.zeros(3, 3, 32, 32), torch.ones(3, 32, 32)
    maps[1, :, 16:] = 9.
    first, second, third = [np.asarray(p) for p in walk_frames(x, maps, (16, 4), ['a → b']*3)]
    left, right = (slice(60, 160), slice(215, 285)), (slice(60, 160), slice(320, 380))
    assert (first == third).all() and (first[left] == second[left]).all()
    assert (first[right] != second[right]).any(-1).all()
    fig = walk_strip(x, maps, (16, 4), ['a', 'b'], 2)
    assert fig.axes[1].images[1].norm.vmax == 9 and 'looked everywhere alike' in fig.axes[-1].get_xlabel()
    assert walk_strip(x, maps/9, (16, 4), ['a', 'b', 'c'], 1).axes[3].images[1].norm.vmax == 2
