"""A CLIP tokenizer whose small vocabulary is learnt from the captions, saved as vocab.json and merges.txt."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(
    captions: Iterable[str], folder: Path, max_length: int = 16, vocabulary: int = 1200
) -> "CLIPTokenizer":
    """Learn byte-pair merges from `captions`, write the tokenizer to `folder` and return it as loaded from there.

    Every byte is in the vocabulary, alone and as the end of a word, so no prompt is out of vocabulary; `vocabulary`
    bounds the number of entries, two special tokens included. Padding is the end token, as in Stable Diffusion 1.x.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Splitting and lower-casing are CLIP's own, so the words learnt from are the words seen later.
    pipeline = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary - len(alphabet) - 2, 1),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(sorted(captions), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    # CLIP's order: bytes, bytes that end a word, merges in order, special tokens.
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    tokens += [left + right for left, right in merges] + [START, END]
    tokens = list(dict.fromkeys(tokens))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    )
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer
