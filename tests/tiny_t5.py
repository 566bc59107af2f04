"""A random T5 of a few thousand weights, in the files that the published ones come in."""

import io
import itertools
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

WIDTH = 16
_WORDS = ("pick up", "move", "put", "open"), ("the carrot", "the pot", "a towel"), ("left", "right", "on the plate")


def save(folder: Path, seed: int = 0) -> Path:
    """Writes encoder, decoder and tokenizer; the weights are a function of the seed. Returns the folder."""
    folder.mkdir(parents=True)
    sentences, pieces = (" ".join(parts) for parts in itertools.product(*_WORDS)), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=pieces,
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, num_heads=2, d_ff=32, num_layers=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
