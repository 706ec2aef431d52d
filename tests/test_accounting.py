"""The accounting of trained parameters against closed formulas and published counts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.accounting import build_accounting, dncnn_parameters, lora_query_value_parameters

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results/reference/accounting.csv"
WIDTH, HIDDEN, DEPTH = 768, 3072, 12
LAYERS = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)] * DEPTH
OUTPUTS = sum(o for _, o in LAYERS)
NORMS = (2 * DEPTH + 1) * 2 * WIDTH


def lora(rank):
    return sum(rank * (i + o) for i, o in LAYERS)


def bottleneck(width):
    return 2 * width * WIDTH + width + WIDTH


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("accounting") / "accounting.csv"
    return build_accounting(output), pd.read_csv(output)


def test_the_denoisers_have_their_published_sizes(built):
    assert dncnn_parameters(17, 64, 3) == 558_400
    assert dncnn_parameters(17, 128, 3) == 2_222_720
    _, table = built
    sizes = table.drop_duplicates(["data", "denoiser"]).set_index(["data", "denoiser"])
    assert sizes["denoiser_parameters"].to_dict() == {
        ("cifar10", "DnCNN"): 558_400,
        ("cifar10", "ddpm-cifar10-32"): 35_746_307,
        ("cifar10", "improved-diffusion"): 52_546_438,
        ("imagenet", "DnCNN"): 558_400,
        ("imagenet", "guided-diffusion 256"): 552_814_086,
    }


def test_the_dncnn_formula_counts_the_baselines_network():
    from baselines.denoised_smoothing.dncnn import DnCNN

    ours = sum(p.numel() for p in DnCNN(channels=3, depth=17, width=64).parameters())
    assert ours == dncnn_parameters(17, 64, 3)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("head", "", 0),
        ("bias", "", OUTPUTS + NORMS // 2 + WIDTH),
        ("ln_tuning", "", NORMS),
        ("vpt_shallow", "prompts=50", 50 * WIDTH),
        ("vpt_deep", "prompts=5", 46_080),
        ("vpt_deep", "prompts=50", 460_800),
        ("adapter", "bottleneck=16", 2 * DEPTH * bottleneck(16)),
        ("parallel_adapter", "bottleneck=8, scale=0.1", 156_768),
        ("lora", "r=1, lora_alpha=16", lora(1)),
        ("lora", "r=4, of q and v alone", 147_456),
        ("dora", "r=8, lora_alpha=16", lora(8) + OUTPUTS),
        ("boft", "boft_block_size=8", sum(8 * i + o for i, o in LAYERS)),
        ("vera", "r=256, d_initial=0.1", 256 * len(LAYERS) + OUTPUTS),
        ("ia3", "", DEPTH * (3 * WIDTH + HIDDEN)),
    ],
)
def test_sizes_follow_their_formulas(built, kind, settings, expected):
    _, table = built
    table = table.fillna({"settings": ""})
    rows = table[(table["kind"] == kind) & (table["settings"] == settings)]
    assert (rows["trainable_without_head"] == expected).all()
    heads = rows["trainable_with_head"] - rows["trainable_without_head"]
    by_data = dict(zip(rows["data"], heads, strict=True))
    assert by_data == {"cifar10": 7_690, "imagenet": 769_000}


def test_the_claim_holds_where_the_paper_can_have_meant_it_and_not_elsewhere(built):
    lines, table = built
    small = table["settings"].eq("prompts=5") & table["kind"].eq("vpt_deep")
    cifar = table[small & table["data"].eq("cifar10")].set_index("denoiser")
    assert np.isclose(cifar.loc["DnCNN", "ratio_with_head"], 558_400 / 53_770)
    assert cifar.loc["DnCNN", "holds_with_head"]
    assert np.isclose(cifar.loc["improved-diffusion", "ratio_with_head"], 52_546_438 / 53_770)
    assert not cifar.loc["improved-diffusion", "holds_with_head"]
    assert cifar.loc["improved-diffusion", "holds_without_head"]
    # A head of 1000 classes alone is larger than a DnCNN.
    assert not table.loc[table["data"] == "imagenet", "holds_with_head"].any()
    assert len(lines) == 5
    assert lines[3].startswith("imagenet, DnCNN: ")
    assert lines[3].endswith("head, 0 with it")


def test_query_and_value_lora_has_its_published_sizes():
    sizes = [lora_query_value_parameters(rank) for rank in (1, 4, 8, 16)]
    assert sizes == [36_864, 147_456, 294_912, 589_824]


def test_the_committed_table_is_current(built):
    pd.testing.assert_frame_equal(built[1], pd.read_csv(REFERENCE))
