"""Train the byte-level BPE of the small world on its captions; writes a CLIPTokenizer folder.

    python assets/emoji/build_tokenizer.py

Lower-cased, with CLIP's own start and end tokens; vocab.json and merges.txt, as CLIP ships them.
The pipeline and both CLIP models use the same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import load_pairs, tidy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

HERE = Path(__file__).resolve().parent
LENGTH = 24  # the longest caption is shorter; attention over padding costs time
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"


def train_bpe(captions: list[str], num_tokens: int) -> tuple[dict[str, int], list[str]]:
    """Vocabulary in CLIP's order (bytes, bytes ending a word, merges, start, end) and merges."""
    template = CLIPTokenizer()  # its normaliser and pre-tokeniser define what a word is
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    tokenizer.normalizer = template.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    order = alphabet + [letter + SUFFIX for letter in alphabet]
    order += [merge.replace(" ", "") for merge in merges]
    order = list(dict.fromkeys([*order, START, END]))
    return {token: index for index, token in enumerate(order)}, merges


def save(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the configs; return the tokenizer as loaded again."""
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges], model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tidy(folder)
    return CLIPTokenizer.from_pretrained(folder)


def main() -> None:
    """Train on all captions and write the files to the three folders that need them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1800, help="upper bound before specials")
    args = parser.parse_args()
    captions = load_pairs()[1]
    vocabulary, merges = train_bpe(captions, args.tokens)
    for folder in (HERE / "sd" / "tokenizer", HERE / "reward", HERE / "judge"):
        tokenizer = save(folder, vocabulary, merges)
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    print(f"{len(vocabulary)} tokens, captions of {max(lengths)} tokens at most")
    assert max(lengths) <= LENGTH
    print(tokenizer.tokenize("Woman firefighter: dark skin tone"))


if __name__ == "__main__":
    main()
