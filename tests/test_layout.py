import pytest

from dalle_fast.layout import SequenceLayout


def test_the_default_is_the_papers():
    layout = SequenceLayout()
    assert (layout.cells, layout.total, str(layout)) == (1024, 1280, "256+32x32")


@pytest.mark.parametrize("text", ["1+1x1", "257+32x32", "512+64x64", "7+3x5"])
def test_parse_is_the_inverse_of_str(text):
    assert str(SequenceLayout.parse(text)) == text


@pytest.mark.parametrize("values", [(0, 4, 4), (513, 4, 4), (4, 0, 4), (4, 4, 65)])
def test_values_out_of_range_are_named(values):
    with pytest.raises(ValueError, match=r"got (text_len|height|width)=\d+, expected 1 to"):
        SequenceLayout(*values)


@pytest.mark.parametrize("text", ["", "256", "256+32", "256+32*32", "-1+3x3", "0+3x3"])
def test_a_bad_name_is_refused(text):
    with pytest.raises(ValueError, match="got"):
        SequenceLayout.parse(text)
