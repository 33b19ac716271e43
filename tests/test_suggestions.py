import pytest
from tiny import dynprune

from dynprune.paths import conf_dir
from dynprune.suggestions import suggestions


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method.epoch=3", "method.epoch: did you mean method.epochs?"),
        ("evaluation.max_querys=3", "evaluation.max_querys: did you mean evaluation.max_queries?"),
        ("sed=3", "sed: did you mean seed?"),
        ("metod=dpo", "metod: did you mean method?"),
        ("method=dop", "method=dop: did you mean method=dpo?"),
        ("method=fbc,dop", "method=dop: did you mean method=dpo?"),
        ("experiment=quikstart", "experiment=quikstart: did you mean experiment=quickstart?"),
        ("experiment=ablation/metods", "experiment=ablation/metods: did you mean experiment=ablation/methods?"),
        # The right name in the wrong place.
        ("bottleneck=16", "bottleneck: did you mean adapter.bottleneck?"),
        ("~logger.cvs=x", "logger.cvs: did you mean logger.csv?"),
    ],
)
def test_the_nearest_name_is_said(typed, said):
    assert suggestions([typed], conf_dir()) == [said]


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["seed=3", "method=dpo", "method.module.beta=0.3"],
        # A key that only the chosen option has, one that is added, and flags.
        ["model=tiny_llama", "model.num_layers=6", "+mine=1", "-m", "--cfg"],
        ["zzzzzzzz=1"],
        ["method=zzzzzzzz", "method.anything=1"],
        ["not=[readable"],
        # What README types, patterns, Hydra's own keys, and keys that are added by force.
        ["stage=evaluate", "+base@evaluation.lossless.lookup=lossless", "zzzzzzzz2=1"],
        ["method=glob(*)", "seed=1"],
        ["hydra.verbose=true", "hydra.job.name=x"],
        ["++method.min_score=-10"],
    ],
)
def test_where_everything_exists_or_nothing_is_near_nothing_is_said(typed):
    assert suggestions(typed, conf_dir()) == []


def test_ones_own_options_are_known(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/smollm2_135m_mine.yaml").write_text("defaults: [smollm2_135m_fc, _self_]\n")
    typed = ["-cd", str(tmp_path), "model=smollm2_135m_mine", "router.k_maxx=3"]
    assert suggestions(typed, conf_dir()) == ["router.k_maxx: did you mean router.k_max?"]


def test_several_mistakes_have_a_sentence_each():
    assert len(suggestions(["method=dop", "sed=1", "adapter.botleneck=3"], conf_dir())) == 3


def test_the_command_says_it_after_hydra(tmp_path):
    result = dynprune(tmp_path, "experiment=tiny", "method.epoch=3", check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "method.epoch: did you mean method.epochs?"
