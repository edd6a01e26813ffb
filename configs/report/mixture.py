"""The data of the report: the published sets of both phases, with what an epoch takes from each.

python -m omnifusion_jax.train --config=configs/report/mixture.py:pretrain --workdir=runs/pretrain
python -m omnifusion_jax.train --config=configs/report/mixture.py:sft --workdir=runs/sft

Everything else is as in configs/pretrain.py and configs/sft.py. The folder data/ has the layout that LLaVA
and ShareGPT4V publish; sets that are not there are named, with where they come from. The sizes are those of
Table 1 of the report (arXiv 2404.06212). Its proprietary sets are not published and left out: descriptions of
document pages in phase 1; in phase 2 20 thousand Russian questions about documents, and Russian texts. All of
its 10 thousand texts are English here.
"""

from omnifusion_jax.config import SetConfig, variant
from omnifusion_jax.shipped import pretrain as phase_1
from omnifusion_jax.shipped import sft as phase_2

LLAVA = "huggingface.co/datasets/liuhaotian/"
SHAREGPT4V = "huggingface.co/datasets/Lin-Chen/ShareGPT4V"

PRETRAIN = (
    SetConfig(
        name="sharegpt4v-pt",
        path="data/ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json",
        images="data",
        samples=695_000,
        get=f"{SHAREGPT4V}; pictures of COCO train2017, LLaVA-Pretrain and SAM (9 archives) as its page says",
    ),
    SetConfig(
        name="laion-cc-sbu-blip",
        path="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        images="data/LLaVA-Pretrain/images",
        get=f"{LLAVA}LLaVA-Pretrain",
    ),
)
SFT = (
    SetConfig(
        name="sharegpt4v",
        path="data/ShareGPT4V/sharegpt4v_instruct_gpt4-vision_cap100k.json",
        images="data",
        samples=100_000,
        get=SHAREGPT4V,
    ),
    SetConfig(
        name="coco-vqa",
        path="data/vqav2/coco_vqa.json",
        images="data/coco/train2017",
        samples=20_000,
        get="visualqa.org, VQA v2 train questions; as LLaVA records, one picture each",
    ),
    SetConfig(
        name="sam-9k",
        path="data/ShareGPT4V/sam9k.json",
        images="data",
        samples=9_000,
        get=f"{SHAREGPT4V}: of sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json "
        'the records whose "image" begins with sam/',
    ),
    SetConfig(
        name="webdata",
        path="data/ShareGPT4V/webdata.json",
        images="data",
        samples=1_500,
        get=f"{SHAREGPT4V}: of the same file "
        'those whose "image" begins with web-, wikiart/ or share_textvqa/',
    ),
    SetConfig(
        name="ocr-vqa",
        path="data/ocr/textvqa_ocrvqa.json",
        images="data",
        samples=120_000,
        get="textvqa.org (train) and ocr-vqa.github.io, as LLaVA records; "
        "pictures in data/textvqa/train_images and data/ocr_vqa/images",
    ),
    SetConfig(
        name="llava-665k",
        path="data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
        images="data",
        get=f"{LLAVA}LLaVA-Instruct-150K; "
        "pictures in data/coco, gqa, ocr_vqa, textvqa and vg as LLaVA's page says",
    ),
    SetConfig(
        name="alpaca",
        path="data/alpaca/alpaca_data.json",
        samples=10_000,
        get="github.com/tatsu-lab/stanford_alpaca, read as it is",
    ),
)


def mixture(phase, sets):
    config = phase.get_config()
    config.data.path, config.data.images, config.data.sets = "", "", sets
    return config


VARIANTS = {"pretrain": (phase_1, PRETRAIN), "sft": (phase_2, SFT)}


def get_config(name="sft"):
    return mixture(*variant(VARIANTS, name))
