import json

import pytest
import torch

from dalle_fast.config import PRESETS, ModelConfig
from dalle_fast.model import DalleModel


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("openai-12b", 12.0e9, 12.4e9), ("rudalle-malevich", 1.25e9, 1.35e9), ("rudalle-kandinsky", 11.4e9, 12.1e9)],
)
def test_presets_have_the_size_they_are_known_for(preset, low, high):
    with torch.device("meta"):
        model = DalleModel(ModelConfig.preset(preset))
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_layers_of_the_12b_preset_are_the_papers():
    kinds = [p.split("(")[0] for p in ModelConfig.preset("openai-12b").patterns]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert (kinds.count("row"), kinds.count("column"), kinds.count("conv"), kinds[-1]) == (47, 16, 1, "conv")


@pytest.mark.parametrize("name", PRESETS)
def test_json_is_read_back(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_json(config.to_json()) == config


def test_where_the_image_begins():
    def text_len(**changes):
        config = ModelConfig.preset("tiny", **changes)
        return config.layout.text_len, config.first_cell

    assert text_len(start="learned") == (16, 1)
    assert text_len(start="none", lead_token=0) == (17, 0)  # DALLE-pytorch: a leading 0, then the caption
    assert text_len(start="text", lead_token=2) == (16, 1)  # ruDALL-E v2: the last caption token is a cell


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "got dim=0"),
        ({"heads": "2"}, "got heads='2'"),
        ({"start": "late"}, "got start='late', expected one of none, learned, text"),
        ({"patterns": ("row",)}, "got 1 patterns for 4 layers"),
        ({"patterns": ("row", "row", "row", "wide")}, "got pattern kind 'wide'"),
        ({"lead_token": 64}, "got lead_token=64, expected 0 to 63"),
        ({"final_norms": 3}, "got final_norms=3"),
        ({"dim": 66, "token_shift": True}, "got dim=66 with token_shift"),
        ({"height": 65}, "got height=65, expected 1 to 64"),
        ({"caption_len": 1, "start": "text"}, "got caption_len=1 with start='text'"),
    ],
)
def test_impossible_models_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        ModelConfig.preset("tiny", **changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dim": 3}', '{"size": 3}'])
def test_a_bad_config_file_is_named(text):
    with pytest.raises(ValueError, match="got"):
        ModelConfig.from_json(text)


def test_an_unknown_entry_or_preset_is_named():
    values = json.loads(ModelConfig.preset("tiny").to_json()) | {"depth": 3}
    with pytest.raises(ValueError, match=r"got model config entries \['depth'\]"):
        ModelConfig.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="got preset 'huge', expected one of openai-12b, "):
        ModelConfig.preset("huge")
