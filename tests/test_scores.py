"Intra-FID and nearest training images: what page 07 does not hold of them"
from dataclasses import asdict
import warnings

import pytest, torch
from PIL import Image
from sagan import references
from sagan.checkpoints import check_scores
from sagan.data import digits, ImageFiles, Images, to_unit
from sagan.evaluation import (
    frechet_distance, intra_frechet_distance, nearest_images, real_distances, score, Scores)
from sagan.references import Evaluator, feature_statistics, reference


class Shrunk(torch.nn.Module):
    "Features that need no training: an image of 4x4 pixels"
    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 4).flatten(1)  # (B, 16)


evaluator = Evaluator(Shrunk(), 'shrunk')


def drawn(n, D, seed, by=0.):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + by


def fd(f, g): return frechet_distance(*feature_statistics(f), *feature_statistics(g))


@pytest.mark.parametrize('n, m', [(300, 400), (17, 400), (16, 400), (400, 5), (2, 2)])
def test_mean_of_the_classes(n, m):
    "More and fewer images than the 16 features, in classes of different sizes, by one distance per class"
    f, g = drawn(2*n, 16, 0, .3), drawn(m + 200, 16, 1)
    y, z = (torch.arange(2*n) >= n).long(), (torch.arange(m + 200) >= m).long()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ours = intra_frechet_distance(f, y, g, z)
    assert ours == pytest.approx((fd(f[:n], g[:m]) + fd(f[n:], g[m:]))/2, rel=1e-6)


def test_one_class_is_the_fid():
    f, g = drawn(200, 8, 0, .3), drawn(300, 8, 1)
    one = [torch.zeros(len(t), dtype=torch.int64) for t in (f, g)]
    assert intra_frechet_distance(f, one[0], g, one[1]) == pytest.approx(fd(f, g), rel=1e-9)


def test_swapped_classes():
    "The same images under each other's label: FID 0, intra-FID the squared distance of the classes"
    g = torch.cat([drawn(500, 4, 0), drawn(500, 4, 0, by=3)])
    z = torch.arange(1000) // 500
    assert fd(g, g) == pytest.approx(0, abs=1e-6)
    assert intra_frechet_distance(g, z, g, z) == pytest.approx(0, abs=1e-6)
    assert intra_frechet_distance(g, 1 - z, g, z) == pytest.approx(4*3**2, rel=1e-6)


@pytest.mark.parametrize('y, z, words', [
    ([0, 0, 0, 1], [0, 0, 1, 1], 'class 1 has 1 generated and 2 real images'),
    ([0, 0, 1, 1], [0, 0, 0, 0], 'class 1 has 2 generated and 0 real images'),
    ([0, 0, 0, 0], [0, 0, 2, 2], 'class 2 has 0 generated and 2 real images'),
    ([0, 1, 2, 3], [0, 0, 1, 1], r'class 0 has 1 generated and 2 real images \(and 3 more classes'),
])
def test_too_few_images_are_refused(y, z, words):
    with pytest.raises(ValueError, match=words):
        intra_frechet_distance(drawn(4, 2, 0), torch.tensor(y), drawn(4, 2, 1), torch.tensor(z))


def test_no_more_images_than_features_are_warned_of():
    y = torch.zeros(8, dtype=torch.int64)
    with pytest.warns(UserWarning, match='class 0 has 8 generated and 8 real images, but there are 8'):
        intra_frechet_distance(drawn(8, 8, 0), y, drawn(8, 8, 1), y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        intra_frechet_distance(drawn(8, 7, 0), y, drawn(8, 7, 1), y)


def test_features_that_do_not_fit():
    y = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match='needs a class: got 8 and 8 features, but 7 and 8 classes'):
        intra_frechet_distance(drawn(8, 2, 0), y[:7], drawn(8, 2, 1), y)
    with pytest.raises(ValueError, match='NaN'):
        intra_frechet_distance(drawn(8, 2, 0)*torch.nan, y, drawn(8, 2, 1), y)


def test_in_the_record():
    "What `score` returns is the mean over the classes of the features it keeps"
    real = digits()[:600]
    x = to_unit(digits().x[600:1200])
    y = digits().y[600:1200]
    s = score(x, y, evaluator, real)
    f, g = evaluator.measure(x)[0], evaluator.measure(real.x)[0]
    assert s.intra_fid == pytest.approx(sum(fd(f[y == c], g[real.y == c]) for c in range(10))/10, rel=1e-6)
    assert score(x, (y + 1) % 10, evaluator, real).intra_fid > 2*s.intra_fid


def test_none_in_the_record(recwarn):
    "Without classes silently, for a class with too few images with a reason"
    real = digits()[:300]
    unlabeled = Images(real.x, torch.zeros_like(real.y), [], 'unlabeled')
    x = to_unit(real.x)
    assert score(x, unlabeled.y, evaluator, unlabeled).intra_fid is None
    assert not [w for w in recwarn if 'intra' in str(w.message)]
    with pytest.warns(UserWarning, match='intra_fid is None: class 7 has 0 generated'):
        assert score(x[real.y != 7], real.y[real.y != 7], evaluator, real).intra_fid is None


def test_records_that_are_older():
    "One without the field is still a record, with None in it"
    real = digits()[:300]
    s = asdict(score(to_unit(real.x), real.y, evaluator, real))
    names = list(s)
    assert names[names.index('diversity') + 1] == 'intra_fid'
    s['intra_fid'] = None
    old = {k: v for k, v in s.items() if k != 'intra_fid'}
    assert asdict(Scores(**old)) == s
    check_scores(old | dict(step=3))


@pytest.mark.parametrize('by', [evaluator, None], ids=['features', 'pixels'])
def test_a_copy_is_found(by):
    "At distance 0, before all others, and in order; the same from batches and from a reference"
    real = digits()[:250]
    number, distance = nearest_images(real.x[120:130], real, by, k=4)
    assert number[:, 0].tolist() == list(range(120, 130))
    assert distance[:, 0].max() < 1e-4 < distance[:, 1].min()
    assert (distance.diff(dim=1) >= 0).all()
    f = (lambda x: x.flatten(1)) if by is None else (lambda x: by.measure(x)[0])
    whole = torch.cdist(f(to_unit(real.x[120:130])).double(), f(to_unit(real.x)).double())
    assert torch.equal(number, whole.topk(4, largest=False).indices)


def test_a_reference_names_the_images_of_the_whole_set(monkeypatch):
    "Of more images than are kept, the numbers are those of the data set"
    monkeypatch.setattr(references, 'MAX_FEATURES', 40)
    real = digits()[:300]
    ref = reference(real, evaluator)
    kept = references.kept_indices(300)
    assert len(ref.features) == len(kept) == 40
    number, distance = nearest_images(real.x[kept], ref, evaluator, k=2)
    assert torch.equal(number[:, 0], kept) and distance[:, 0].max() < 1e-4
    assert torch.equal(real.y[kept], ref.labels)
    assert len(real_distances(ref, 10)) == 10 and (real_distances(ref) > 0).all()
    assert torch.allclose(real_distances(ref).sort().values, distance[:, 1].sort().values, atol=1e-4)


def test_fewer_real_images_than_asked_for():
    number, distance = nearest_images(digits().x[:5], digits()[:2], evaluator, k=3)
    assert number.shape == distance.shape == (5, 2)


def test_images_in_files(tmp_path):
    for i, x in enumerate(digits().x[:6]):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    number, distance = nearest_images(digits().x[:6], ImageFiles(tmp_path, 32), k=1)
    assert number[:, 0].tolist() == list(range(6)) and distance.max() < 1e-4


def test_rows_of_real_images(tmp_path):
    "The same from memory, from files, and from a mapped file"
    from sagan.reports import image_rows
    from sagan.data import folder
    for i, x in enumerate(digits().x[:6]):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    numbers = torch.tensor([[5, 0], [2, 2]])
    files = ImageFiles(tmp_path, 32)
    mapped = folder(tmp_path, 32, max_gb=0, cache=tmp_path/'cache')
    for images in (digits()[:6], files, mapped):
        assert torch.equal(image_rows(images, numbers), to_unit(digits().x[numbers]))


def test_what_cannot_be_compared():
    real = digits()[:20]
    with pytest.raises(ValueError, match='images of 64 px cannot be compared with images of 32 px'):
        nearest_images(torch.zeros(2, 3, 64, 64), real)
    with pytest.raises(ValueError, match="holds features of 'shrunk'; give that evaluator, not None"):
        nearest_images(real.x, reference(digits()[:100], evaluator))
    with pytest.raises(ValueError, match="give that evaluator, not 'other'"):
        nearest_images(real.x, reference(digits()[:100], evaluator), Evaluator(Shrunk(), 'other'))
