import numpy as np
import pytest

from mimic_video.config import TextConfig
from mimic_video.models.text import make_text_encoder

GOLDEN = [0.9031691, 1.4875125, -1.0567977]  # recorded from another process


@pytest.fixture
def encode():
    return make_text_encoder(TextConfig(rows=6, width=32))


def test_rows_past_the_end_are_zero(encode):
    features = encode("open the drawer")
    assert features.shape == (6, 32) and features.dtype == np.float32
    assert (np.abs(features[:3]).max(axis=1) > 0.5).all()
    np.testing.assert_array_equal(features[3:], 0)
    np.testing.assert_array_equal(encode(""), 0)


def test_a_word_has_one_row_wherever_it_stands(encode):
    first, second = encode("Open the drawer."), encode("the drawer, open")
    np.testing.assert_array_equal(first[[0, 1, 2]], second[[2, 0, 1]])
    rows = encode("open opens close the a an")
    assert len(np.unique(rows.round(4), axis=0)) == 6
    similarity = np.corrcoef(rows)
    assert np.abs(similarity - np.eye(6)).max() < 0.7


def test_features_are_the_same_in_every_process(encode):
    np.testing.assert_allclose(encode("open")[0, :3], GOLDEN, atol=1e-6)


def test_an_instruction_that_is_too_long(encode):
    assert np.abs(encode("a b c d e f")[5]).max() > 0.5
    with pytest.raises(ValueError, match=r"'a b c d e f g' has 7 words; text\.rows is 6"):
        encode("a b c d e f g")
