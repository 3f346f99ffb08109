"Scores of few images, of images without spread, and of numbers that are none"
import warnings
from dataclasses import asdict

import pytest, torch
from sagan.data import digits, Images
from sagan.evaluation import (
    class_spread, frechet_distance, inception_score, intra_frechet_distance, kernel_distance, nearest_images,
    precision_recall, score)
from sagan.measuring import measure_generator
from sagan.networks import Generator
from sagan.references import Evaluator, feature_statistics, reference, train_evaluator

warnings.filterwarnings('ignore', 'images are too few')
nan, inf = torch.nan, torch.inf


def noise(n, classes, like=None):
    "n images of noise, or all alike, of some classes in turn"
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    if like is not None: x = torch.full_like(x, like)
    names = [str(c) for c in range(classes)] if classes else []
    return Images(x, torch.arange(n) % max(1, classes), names, 'noise')


def scores_of(images, drawn=20):
    "Scores of images drawn from the real ones, and what was warned of"
    evaluator = train_evaluator(images, steps=2)
    i = torch.arange(drawn) % len(images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        s = score(images.x[i], images.y[i], evaluator, reference(images, evaluator))
    return asdict(s), ' '.join(str(w.message) for w in caught)


@pytest.mark.parametrize('n, classes', [(0, 0), (1, 0), (2, 2), (3, 2), (3, 0)])
def test_too_few_real_images_are_a_sentence(n, classes):
    images = noise(n, classes)
    with pytest.raises(ValueError, match=f'at least 4 real images, got {n} of noise'): train_evaluator(images)
    if n < 2: return
    evaluator = Evaluator(torch.nn.Flatten(), 'pixels')
    with pytest.warns(UserWarning, match='too few'): real = reference(images, evaluator)
    with pytest.raises(ValueError, match=f'scores need at least 4 real images, got {n}'):
        score(images.x, images.y, evaluator, real)


@pytest.mark.parametrize('n, classes', [(4, 2), (4, 4), (5, 0), (10, 10)])
def test_few_images_are_scored(n, classes):
    "One image per class has no spread within a class, and one of many classes no distance within it"
    s, warned = scores_of(noise(n, classes))
    assert s['fid'] < .01 and abs(s['kid']) < .01 and s['precision'] == s['recall'] == 1
    assert (s['inception_score'] is None) == (not classes)
    assert (s['diversity'] is None) == (classes == n)
    if classes == n: assert s['intra_fid'] is None and 'intra_fid is None: class 0 has' in warned


@pytest.mark.parametrize('n', [12, 60, 130])
def test_images_without_spread(n):
    "Batches of several sizes differ by rounding, which is no spread"
    s, warned = scores_of(noise(n, 2, like=120), 30)
    assert s['fid'] < 1e-6 and abs(s['kid']) < 1e-4 and s['inception_score'] < 1 + 1e-6
    assert (s['precision'], s['recall'], s['diversity']) == (1, 1, None)
    assert 'diversity is None, because the real images of each class are all alike' in warned


def test_distances_of_covariances_without_full_rank():
    f = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    zero = torch.zeros(8, 8).double()
    mu, sigma = feature_statistics(f)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-6                       # of rank 2
    assert frechet_distance(mu, zero, mu + 2, zero) == pytest.approx(32)       # points
    assert frechet_distance(mu, sigma, mu, zero) == pytest.approx(sigma.trace().item())
    assert frechet_distance(mu.float(), sigma.float(), mu, sigma) < 1e-4


def a_tensor_of(value):
    "Features with one number that is none"
    f = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    f[3, 2] = value
    return f


@pytest.mark.parametrize('bad', [nan, inf])
def test_nan_in_is_an_error(bad):
    f, g, y = a_tensor_of(bad), a_tensor_of(0.), torch.zeros(20, dtype=torch.int64)
    mu, sigma = feature_statistics(g)
    for measure in (
            lambda: kernel_distance(f, g), lambda: kernel_distance(g, f), lambda: precision_recall(f, g),
            lambda: precision_recall(g, f), lambda: feature_statistics([g, f]), lambda: class_spread(f, y),
            lambda: intra_frechet_distance(f, y, g, y), lambda: intra_frechet_distance(g, y, f, y),
            lambda: frechet_distance(f[3], sigma, mu, sigma),
            lambda: frechet_distance(mu, sigma, mu, sigma*bad)):
        with pytest.raises(ValueError, match='NaN or infinite'): measure()
    with pytest.raises(ValueError, match='sum to 1'): inception_score(f)


def test_what_is_no_covariance():
    mu, sigma = feature_statistics(a_tensor_of(0.))
    skew = sigma + torch.tril(torch.ones(8, 8), -1)
    for message, first, second in (('sigma1 is not symmetric', skew, sigma), ('sigma1 is no', -sigma, sigma),
                                   ('sigma2 is not symmetric', sigma, skew), ('sigma2 is no', sigma, -sigma)):
        with pytest.raises(ValueError, match=message): frechet_distance(mu, first, mu, second)


def test_empty_batches_change_nothing():
    f = a_tensor_of(0.)
    for a, b in zip(feature_statistics([f[:0], f[:7], f[7:7], f[7:]]), feature_statistics(f)):
        assert torch.allclose(a, b)
    with pytest.raises(ValueError, match='got 0 of them'): feature_statistics([f[:0]])
    with pytest.raises(ValueError, match='3 numbers, earlier batches 8'): feature_statistics([f, f[:, :3]])


def test_measured_generators():
    "Of NaN, too few images, and images, labels and references that do not fit"
    images = digits()[:40]
    evaluator = Evaluator(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten()), 'means')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        real, x, y = reference(images, evaluator), images.x, images.y
        G = Generator(32, 10, 2, (), z_dim=8)
        assert measure_generator(G, images, evaluator, real, 20)['fid'] > 0
        for n in (0, 2, -1, '20'):
            with pytest.raises(ValueError, match='whole number, at least 10'):
                measure_generator(G, images, evaluator, real, n)
        G.conv.bias.data.fill_(nan)
        with pytest.raises(ValueError, match='images must be finite'):
            measure_generator(G, images, evaluator, real, 20)
        for bad in (x[..., :16], x[:, :, :16]):
            with pytest.raises(ValueError, match='must have shape'): score(bad, y, evaluator, real)
            with pytest.raises(ValueError, match='must have shape'): nearest_images(bad, images)
        for labels in (y.float(), y - 5, y.tolist(), y[:, None]):
            with pytest.raises(ValueError, match='y must be int64'): score(x, labels, evaluator, real)
        with pytest.raises(ValueError, match='real must be a Reference'): score(x, y, evaluator, None)
        huge = Evaluator(torch.nn.Sequential(evaluator.net, torch.nn.Threshold(1e30, 1e30)), 'means')
        with pytest.raises((FloatingPointError, ValueError)): score(x, y, huge, images)
