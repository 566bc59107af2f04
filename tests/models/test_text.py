import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import tiny_t5
import torch
from transformers import AutoTokenizer, T5EncoderModel, T5ForConditionalGeneration

from mimic_video.config import ConfigError, TextConfig
from mimic_video.models.text import (
    DamagedEntryError,
    FeatureCache,
    T5TextEncoder,
    fingerprint,
    make_text_encoder,
    read_prompts,
)

pytestmark = pytest.mark.reference

GOLDEN = [0.9031691, 1.4875125, -1.0567977]  # recorded from another process
CARROT, LONG = "pick up the carrot", "put the carrot on the plate and then move the pot to the left"
PROMPTS = [CARROT, "zebra!", LONG, ""]  # known words, unknown letters, long, nothing but the end token
ROWS = 48


@pytest.fixture
def encode():
    return make_text_encoder(TextConfig(rows=6), 32)


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A T5 named `t5-tiny` and another of the same name."""
    return [tiny_t5.save(tmp_path_factory.mktemp("t5") / "t5-tiny", seed) for seed in (0, 1)]


@pytest.fixture
def model(saved, tmp_path):
    """A copy of the first, for tests that change it."""
    return shutil.copytree(saved[0], tmp_path / "t5-tiny")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def t5(model, cache="", **fields):
    return TextConfig(kind="t5", **{"rows": ROWS, "model": str(model), "cache": str(cache)} | fields)


def encoder_of(config, width=tiny_t5.WIDTH):
    return make_text_encoder(config, width)


def published(model, prompt, rows=ROWS):
    """Features the way the published system makes them: padded to `rows` tokens first, zeroed afterwards."""
    tokens = AutoTokenizer.from_pretrained(model)(
        [prompt], padding="max_length", truncation=True, max_length=rows, return_tensors="pt"
    )
    encoder = T5EncoderModel.from_pretrained(model)
    with torch.no_grad():
        hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0].numpy().copy()
    hidden[tokens.attention_mask[0].sum() :] = 0
    return hidden


def entries(cache):
    return sorted(cache.glob("*/*"))


@pytest.fixture
def without_libraries(monkeypatch):
    """A machine on which neither the model's libraries nor Hugging Face's are installed."""
    for name in ("torch", "transformers", "huggingface_hub", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)


def test_t5_features_are_those_of_the_published_procedure(saved):
    encode = encoder_of(t5(saved[0]))
    pieces = sentencepiece.SentencePieceProcessor(str(saved[0] / "spiece.model"))
    for prompt in PROMPTS:
        features, length = encode(prompt), len(pieces.encode(prompt)) + 1  # the end token
        assert features.shape == (ROWS, tiny_t5.WIDTH) and features.dtype == np.float32
        assert (np.abs(features[:length]).max(axis=1) > 0.01).all()
        np.testing.assert_array_equal(features[length:], 0)
        np.testing.assert_allclose(features, published(saved[0], prompt), atol=1e-5)
    assert np.abs(encode("pick up the pot") - encode(CARROT)).max() > 0.01


def test_prompts_encoded_together_are_as_if_encoded_alone(saved, cache):
    together, alone = T5TextEncoder(t5(saved[0], cache), tiny_t5.WIDTH), T5TextEncoder(t5(saved[0]), tiny_t5.WIDTH)
    assert together.missing([*PROMPTS, CARROT]) == PROMPTS
    together.add(PROMPTS)
    assert together.missing(PROMPTS) == [] and len(entries(cache)) == len(PROMPTS)
    for prompt in PROMPTS:
        np.testing.assert_allclose(together(prompt), alone(prompt), atol=1e-5)


def test_a_prompt_of_too_many_tokens_is_cut_with_a_warning(saved, caplog):
    encode = encoder_of(t5(saved[0], rows=5))
    features = encode(LONG)
    assert re.search(rf"text\.rows is 5; cut from \d\d tokens: '{LONG}'", caplog.text)
    np.testing.assert_allclose(features, published(saved[0], LONG, rows=5), atol=1e-5)
    assert np.abs(features[4]).max() > 0.01  # its end token
    caplog.clear()
    encode(LONG), encode("put")
    assert not caplog.records


def test_cut_features_are_not_used_for_more_rows(saved, cache):
    encoder_of(t5(saved[0], cache, rows=5))(LONG)
    assert np.abs(encoder_of(t5(saved[0], cache))(LONG)[5:15]).max() > 0.01


def test_bfloat16(saved, cache):
    exact, rounded = (encoder_of(t5(saved[0], cache, precision=p))(LONG) for p in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, torch.tensor(rounded).bfloat16().float().numpy())
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_weights_as_pytorch_files_and_a_tokenizer_as_sentencepiece(saved, tmp_path):
    old, encode = tmp_path / "old", encoder_of(t5(saved[0]))
    old.mkdir()
    shutil.copy(saved[0] / "config.json", old)
    shutil.copy(saved[0] / "spiece.model", old)
    torch.save(T5ForConditionalGeneration.from_pretrained(saved[0]).state_dict(), old / "pytorch_model.bin")
    np.testing.assert_array_equal(encoder_of(t5(old))(LONG), encode(LONG))


def test_weights_in_several_files(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "t5-tiny")
    (folder / "model.safetensors").unlink()
    T5ForConditionalGeneration.from_pretrained(saved[0]).save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    np.testing.assert_array_equal(encoder_of(t5(folder))(LONG), encoder_of(t5(saved[0]))(LONG))
    before = fingerprint(folder)
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"x")
    assert fingerprint(folder) != before
    shards[1].unlink()
    with pytest.raises(ConfigError, match=f"has no {shards[1].name}, which its model.safetensors.index.json names"):
        encoder_of(t5(folder))


def test_a_model_by_its_name_among_what_was_downloaded(saved, tmp_path, cache, monkeypatch):
    hub, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    with pytest.raises(ConfigError, match=r"text\.model' is 'google-t5/t5-tiny', which is not on this machine"):
        encoder_of(t5("google-t5/t5-tiny"))
    repository = hub / "models--google-t5--t5-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved[0], repository / "snapshots" / commit)
    features = encoder_of(t5("google-t5/t5-tiny", cache))(CARROT)
    (repository / "snapshots" / commit / "model.safetensors").unlink()  # as when only its configuration was asked for
    np.testing.assert_array_equal(encoder_of(t5("google-t5/t5-tiny", cache))(CARROT), features)
    np.testing.assert_array_equal(encoder_of(t5(saved[0], cache))(CARROT), features)


def test_a_cache_serves_a_machine_without_model_and_libraries(saved, cache):
    features = encoder_of(t5(saved[0], cache))(LONG)
    script = f"""
        import sys
        for name in ("torch", "transformers", "huggingface_hub", "sentencepiece", "tokenizers", "tensorflow"):
            sys.modules[name] = None
        from mimic_video.config import TextConfig
        from mimic_video.models.text import make_text_encoder
        encode = make_text_encoder(TextConfig(kind="t5", rows={ROWS}, model="nowhere/t5-tiny", cache={str(cache)!r}), 16)
        sys.stdout.buffer.write(encode({LONG!r}).tobytes())
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=True).stdout
    np.testing.assert_array_equal(np.frombuffer(output, np.float32).reshape(features.shape), features)


def test_no_model_is_loaded_for_prompts_that_are_kept(saved, cache, without_libraries):
    config = t5(saved[0], cache)
    with pytest.raises(ConfigError, match=r"extra 'text' .*pip install 'mimic-video-jax\[text\]'"):
        encoder_of(config)(CARROT)
    FeatureCache(cache / f"t5-tiny-float32-{ROWS}rows-{fingerprint(saved[0])}")[CARROT] = np.ones((3, 16), np.float32)
    assert encoder_of(config)(CARROT).sum() == 3 * 16


def test_an_entry_can_be_read_by_people_and_holds_real_rows_only(saved, cache):
    encoder_of(t5(saved[0], cache))("Pick up the CARROT, s'il te plaît!")
    (path,) = entries(cache)
    assert re.fullmatch(
        rf"t5-tiny-float32-{ROWS}rows-[0-9a-f]{{16}}/pick_up_the_carrot_s_il_te_pla_t-[0-9a-f]{{16}}\.npz",
        path.relative_to(cache).as_posix(),
    )
    with np.load(path) as entry:
        assert entry["prompt"].item() == "Pick up the CARROT, s'il te plaît!"
        assert 10 < len(entry["features"]) < ROWS and np.abs(entry["features"]).max(axis=1).min() > 0.01


def test_prompts_that_differ_only_in_case_or_marks_have_their_own_features(saved, cache):
    encode, keep = encoder_of(t5(saved[0], cache)), encoder_of(t5(saved[0]))
    for prompt in ("put", "Put", "put.", "字", "文"):
        np.testing.assert_array_equal(encode(prompt), keep(prompt))
    assert len(entries(cache)) == 5


def test_features_of_other_weights_of_the_same_name_are_not_used(saved, cache, caplog):
    first = encoder_of(t5(saved[0], cache))(CARROT)
    second = encoder_of(t5(saved[1], cache))(CARROT)
    assert "features of another model" in caplog.text and f"t5-tiny-float32-{ROWS}rows-{fingerprint(saved[0])}" in caplog.text
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(second, published(saved[1], CARROT), atol=1e-5)
    np.testing.assert_array_equal(encoder_of(t5(saved[0], cache))(CARROT), first)
    with pytest.raises(ConfigError, match=rf"keep one of .*{fingerprint(saved[0])}"):  # which of the two, nobody knows
        encoder_of(t5("nowhere/t5-tiny", cache))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json", "model.safetensors"])
def test_a_fingerprint_tells_any_change(model, saved, name):
    assert fingerprint(model) == fingerprint(saved[0])
    content = (model / name).read_bytes()
    position = len(content) // 2
    (model / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert fingerprint(model) != fingerprint(saved[0])


def test_a_fingerprint_samples_weights_that_are_large(model):
    size = 2**25
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(size)  # sparse
    prints = {fingerprint(model)}
    for start in (0, 5_000_000, 20_000_001, size - 100):
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(start)
            file.write(b"x" * min(size // 1024, size - start))
        prints.add(fingerprint(model))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert len(prints | {fingerprint(model)}) == 6


def test_a_prompt_that_nothing_knows(saved, cache):
    encoder_of(t5(saved[0], cache))(CARROT)
    encode = encoder_of(t5("nowhere/t5-tiny", cache))
    message = r"'zebra!' is not in text\.cache .* text\.model 'nowhere/t5-tiny' is not on this machine.*precompute_text\.py"
    with pytest.raises(ConfigError, match=message):
        encode("zebra!")


@pytest.mark.parametrize("fields", [{"rows": 24}, {"precision": "bfloat16"}])
def test_a_cache_of_another_configuration(saved, cache, fields):
    encoder_of(t5(saved[0], cache))(CARROT)
    with pytest.raises(ConfigError, match=r"text\.cache .* has no folder t5-tiny-.*-\*"):
        encoder_of(t5("nowhere/t5-tiny", cache, **fields))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"xx" + b[202:]])
def test_a_damaged_entry_is_encoded_again_or_an_error(saved, cache, caplog, damage):
    features = encoder_of(t5(saved[0], cache))(LONG)
    (path,) = entries(cache)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{path.name}.* cannot be read: .*copy it here again"):
        encoder_of(t5("nowhere/t5-tiny", cache))(LONG)
    assert T5TextEncoder(t5(saved[0], cache), tiny_t5.WIDTH).missing([LONG]) == [LONG]
    np.testing.assert_array_equal(encoder_of(t5(saved[0], cache))(LONG), features)
    assert path.name in caplog.text and "encoded again" in caplog.text
    np.testing.assert_array_equal(encoder_of(t5("nowhere/t5-tiny", cache))(LONG), features)


def test_an_entry_of_another_prompt_or_type_is_damaged(cache):
    kept = FeatureCache(cache / "model")
    kept["put"] = np.ones((2, 4), np.float32)
    kept["move"] = np.ones((2, 4), np.float32)
    put, move = entries(cache)[1], entries(cache)[0]
    shutil.copy(put, move)
    with pytest.raises(DamagedEntryError, match=r"move-.* for the prompt 'put'; expected float32 rows for 'move'"):
        kept.get("move")
    np.savez(put, prompt=np.array("put"), features=np.ones(4, np.float32))
    with pytest.raises(DamagedEntryError, match=r"float32 \(4,\)"):
        kept.get("put")


def test_an_entry_is_whole_whenever_it_is_read(cache):
    stop, problems = threading.Event(), []

    def read():
        kept = FeatureCache(cache / "model")
        while not stop.is_set():
            features = kept.get("put")
            if len(np.unique(features)) != 1:
                problems.append(features)

    def write(value):
        for _ in range(50):
            FeatureCache(cache / "model")["put"] = np.full((40, 64), value, np.float32)

    write(0)
    with ThreadPoolExecutor(4) as pool:
        readers, writers = [pool.submit(read) for _ in range(2)], [pool.submit(write, value) for value in (1, 2)]
        for writer in writers:
            writer.result()
        stop.set()
        for reader in readers:
            reader.result()
    assert not problems and len(entries(cache)) == 1


def test_a_write_that_fails_leaves_nothing(cache, monkeypatch):
    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        FeatureCache(cache / "model")["put"] = np.ones((2, 4), np.float32)
    assert entries(cache) == []


def test_many_threads_share_an_encoder(saved, cache):
    encode, alone = encoder_of(t5(saved[0], cache)), encoder_of(t5(saved[0]))
    with ThreadPoolExecutor(8) as pool:
        features = list(pool.map(encode, PROMPTS * 6))
    for prompt, found in zip(PROMPTS * 6, features, strict=True):
        np.testing.assert_array_equal(found, alone(prompt))


def test_worker_processes_use_the_same_cache(saved, cache):
    encode = encoder_of(t5(saved[0], cache))
    features = encode(CARROT)  # with its model loaded, and a lock
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(encode))(CARROT), features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"has no config\.json; expected the folder of a T5 model"),
        ("model.safetensors", r"has no model\.safetensors or .*pytorch_model\.bin"),
    ],
)
def test_a_folder_that_lacks_a_file(model, name, message):
    (model / name).unlink()
    with pytest.raises(ConfigError, match=message):
        encoder_of(t5(model))


def test_a_folder_that_lacks_its_tokenizer(model):
    (model / "tokenizer.json").unlink()
    (model / "spiece.model").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json or spiece\.model"):
        encoder_of(t5(model))


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"text\.model' is '.*nowhere', which is not on this machine, and text\.cache is empty"):
        encoder_of(t5(tmp_path / "nowhere"))


def test_a_width_that_is_not_the_models(saved, cache):
    with pytest.raises(ConfigError, match=r"'backbone\.text_width' is 24; expected 16, that of text\.model"):
        encoder_of(t5(saved[0]), 24)
    encoder_of(t5(saved[0], cache))(CARROT)
    with pytest.raises(ConfigError, match=r"'backbone\.text_width' is 24; expected 16, the width of features in text\.cache"):
        encoder_of(t5("nowhere/t5-tiny", cache), 24)(CARROT)


def test_a_model_of_another_type(model):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"model_type": "umt5"}))
    with pytest.raises(ConfigError, match=r"a model of type 'umt5'; expected 't5'"):
        encoder_of(t5(model))


def test_weights_that_are_damaged_or_incomplete(model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({key: value for key, value in weights.items() if key != name}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"has no weights for {re.escape(name)}"):
        encoder_of(t5(model))(CARROT)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"text\.model {model} cannot be loaded on 'cpu'"):
        encoder_of(t5(model))(CARROT)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the second as Windows writes it
def test_prompts_of_a_file(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_text("hebe das Möhrchen auf\r\n\r\n  open it \n", encoding=encoding)
    assert read_prompts(tmp_path / "prompts.txt") == ["hebe das Möhrchen auf", "open it"]
    (tmp_path / "prompts.txt").write_bytes(2 * "open it\n".encode("utf-8-sig"))  # of two files
    assert read_prompts(tmp_path / "prompts.txt") == ["open it", "open it"]
    (tmp_path / "prompts.txt").write_text("open it", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"--prompts=.*prompts\.txt cannot be read: 'utf-8' codec"):
        read_prompts(tmp_path / "prompts.txt")
