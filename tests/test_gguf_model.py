"""A GGUF file is a model: its weights, and its tokenizer as the file names its cut."""

import struct
from copy import deepcopy
from math import inf

import gguf
import numpy as np
import pytest
from test_gguf import GRIDS, quantized, tokenizer, tokens  # noqa: F401 - two are fixtures

import rotlib as rl
from rotlib.checkpoints.gguf_file import NAME
from rotlib.models import gguf_model, names, zoo
from rotlib.models.content import model_content
from rotlib.models.gguf_tokenizer import CUTS, cut_of, pre_tokenizer_of

pytestmark = pytest.mark.slow
MIXED = (
    'In 2024, über 1,234.5 naïve 模型 said: "it\'s 🤗 fine"\n\n\tdef f(x):\n    return x**2  # 10%'
)


@pytest.fixture
def file(tmp_path, monkeypatch, tokens, tokenizer):  # noqa: F811
    """A tiny model's, and the model that was written."""
    monkeypatch.setenv("ROTLIB_CACHE", str(tmp_path / "cache"))

    def written(name="qwen2, biases"):
        model = quantized(name, GRIDS["Q8_0, groups"], tokens)
        own = deepcopy(tokenizer)
        cut = "qwen2" if "qwen" in name else "smollm"
        own.backend_tokenizer.pre_tokenizer = pre_tokenizer_of(cut)
        return rl.export(model, tmp_path / "out", "gguf", own) / NAME, model, own

    return written


def rewritten(path, keys=None, tensors=None, without=""):
    """The file with other keys, with tensors more, or without what is named so."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(
        path.with_name("other.gguf"), reader.get_field("general.architecture").contents()
    )
    for name, field in reader.fields.items():
        if (
            not name.startswith("GGUF.")
            and name != "general.architecture"
            and name not in (keys or {})
        ):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in (keys or {}).items():
        kind = {bool: "add_bool", float: "add_float32", int: "add_uint32", str: "add_string"}
        kind |= {list: "add_array"}
        getattr(writer, kind[type(value)])(name, value)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path.with_name("other.gguf"))


@pytest.mark.parametrize("name", ["llama", "qwen2, biases", "qwen3, q/k norms"])
def test_a_gguf_file_is_loaded_as_the_model_that_was_written(file, tokens, name):  # noqa: F811
    path, model, its_own = file(name)
    read, its_tokenizer = rl.load(str(path), device="cpu")
    wanted = model(tokens).logits
    assert (read(tokens).logits - wanted).abs().max() < 2e-3 * wanted.abs().max()
    assert its_tokenizer(MIXED).input_ids == its_own(MIXED).input_ids
    assert rl.fuse(read, rl.hadamard_rotation(read)) is read


def test_the_same_file_is_dequantized_once_and_another_of_its_name_anew(file, monkeypatch):
    path, *_ = file()
    first = model_content(str(path))
    rl.load(str(path))
    unpack = gguf_model.unpack
    monkeypatch.setattr(gguf_model, "unpack", None)
    rl.load(str(path))
    monkeypatch.setattr(gguf_model, "unpack", unpack)
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 1
    path.write_bytes(changed)
    assert model_content(str(path)) != first
    rl.load(str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_was_dequantized_and_then_changed_is_dequantized_anew(file, name):
    path, *_ = file()
    folder = gguf_model.unpacked_gguf(path)
    whole = (folder / name).read_bytes()
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50], None):
        (folder / name).unlink()
        if changed is not None:
            (folder / name).write_bytes(changed)
        rl.load(str(path))
        assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize("cut", CUTS.values())
def test_text_is_cut_as_the_file_says(file, cut):
    path, *_ = file("qwen2, biases" if cut == "qwen2" else "llama")
    other = rewritten(path, {"tokenizer.ggml.pre": cut})
    assert cut_of(zoo.load_tokenizer(other)) == cut
    wanted = {"gpt-2": 1, "smollm": 4, "llama-bpe": 2, "qwen2": 4}
    pieces = zoo.load_tokenizer(other).backend_tokenizer.pre_tokenizer.pre_tokenize_str("2024")
    assert len(pieces) == wanted[cut]


def test_an_alias_is_a_file_of_its_sum_wherever_it_lies(file, monkeypatch):
    path, *_ = file()
    monkeypatch.setenv("ROTLIB_MODELS", str(path.parent))
    alias = names.HubFile(
        "nobody/nothing", "tiny.gguf", path.stat().st_size, names.known_digest(path)
    )
    monkeypatch.setitem(names.FILES, "tiny", alias)
    assert rl.load("tiny")[0].config.model_type == "qwen2"
    monkeypatch.setitem(names.FILES, "tiny", alias._replace(sha256="0"))
    with pytest.raises(ValueError, match=r"put tiny\.gguf of the Hub's nobody/nothing"):
        rl.load("tiny")


def test_a_file_that_would_be_misread_is_refused_in_one_sentence(file):
    path, *_ = file()
    cases = [
        ({"qwen2.rope.scaling.type": "yarn"}, None, "rope.scaling.type is 'yarn'"),
        ({"tokenizer.ggml.pre": "poro"}, None, "cut like 'poro'"),
        ({"tokenizer.ggml.pre": "smollm"}, None, "of qwen2 models doesn't cut text like 'smollm'"),
        ({"tokenizer.ggml.model": "llama"}, None, "tokenizer is of the kind 'llama'"),
        (None, {"rope_freqs.weight": np.ones(8, np.float32)}, "its tensor rope_freqs.weight"),
    ]
    for keys, tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            rl.load(rewritten(path, keys, tensors))
    whole = path.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or cut short"):
            rl.load(str(path))
    with pytest.raises(ValueError, match=r"there is no file .nowhere\.gguf. here"):
        rl.load("nowhere.gguf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qwen2.rope.scale_linear", 4.0),
        ("qwen2.rope.scaling.factor", 4.0),
        ("qwen2.rope.dimension_count", 8),
        ("qwen2.attention.causal", False),
        ("qwen2.attention.head_count", 0),
        ("qwen2.block_count", 3),
        ("qwen2.attention.head_count_kv", 4),
        ("qwen2.attention.head_count_kv", 0),
        ("qwen2.attention.head_count_kv", 3),
        ("qwen2.attention.layer_norm_rms_epsilon", inf),
        ("qwen2.rope.freq_base", inf),
        ("qwen2.block_count", 1000),
        ("split.count", 2),
        ("tokenizer.ggml.bos_token_id", 5000),
        ("tokenizer.ggml.bos_token_id", "one"),
        ("tokenizer.ggml.add_bos_token", "no"),
        ("tokenizer.ggml.tokens", ["a", "a"]),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.token_type", ["normal"]),
        ("tokenizer.ggml.token_type", [1, 3]),
        ("tokenizer.ggml.token_type", [99] * 384),
        ("tokenizer.ggml.merges", ["th"]),
        ("split.count", "2"),
    ],
)
def test_a_key_that_changes_what_is_computed_is_not_passed_over(file, name, value):
    path, *_ = file()
    with pytest.raises(ValueError, match=r"its key|has no tensor|its tensor|one part of"):
        rl.load(rewritten(path, {name: value}))


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_that_was_joined_of_its_parts_is_read(file, count):
    path, *_ = file()
    rl.load(rewritten(path, {"split.count": count}))


def test_a_tensor_that_lies_in_another_ones_place_is_not_read(file):
    path, *_ = file()
    whole, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    info = whole.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    offset = info + 8 + 8 * struct.unpack("<I", whole[info : info + 4])[0]  # behind sizes and type
    for elsewhere in (0, 1):
        path.write_bytes(whole[:offset] + struct.pack("<Q", elsewhere) + whole[offset + 8 :])
        with pytest.raises(ValueError, match="doesn't begin where the one before it ends"):
            rl.load(str(path))
    path.write_bytes(whole + bytes(64))
    with pytest.raises(ValueError, match="goes on behind its last tensor"):
        rl.load(str(path))


def test_an_architecture_that_is_not_known_is_refused_by_its_name(file, monkeypatch):
    path, *_ = file()
    monkeypatch.setattr(gguf_model, "ARCHITECTURES", {"llama": "llama"})
    with pytest.raises(ValueError, match="it is of the architecture 'qwen2'"):
        rl.load(str(path))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_q.bias", "output_norm.weight"])
def test_a_tensor_that_is_missing_is_not_drawn_at_random(file, name):
    path, *_ = file()
    with pytest.raises(ValueError, match=f"it has no tensor {name}"):
        rl.load(rewritten(path, without=name))


def test_a_namesake_in_the_working_directory_is_not_taken(file, tmp_path, monkeypatch):
    path, model, _ = file()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / NAME).write_bytes(b"another model")
    monkeypatch.chdir(tmp_path / "here")
    read, _ = rl.load(str(path), device="cpu")
    both = [one.model.layers[1].mlp.down_proj.weight for one in (read, model)]
    assert (both[0] - both[1]).abs().max() < 1e-3 * both[1].abs().max()


def test_an_export_does_not_replace_the_file_it_was_made_from(file):
    path, *_ = file()
    model, its_own = rl.load(str(path), device="cpu")
    rl.rtn(model, rl.WeightQuant(bits=2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds the model that is exported"):
        rl.export(model, path.parent, tokenizer=its_own, overwrite=True)
    assert path.read_bytes() == before


def test_a_cached_folder_that_has_lost_a_file_is_made_again(file, tmp_path):
    path, _, its_own = file()
    rl.load(str(path))
    next((tmp_path / "cache").glob("model-*/tokenizer.json")).unlink()
    assert rl.load(str(path))[1](MIXED).input_ids == its_own(MIXED).input_ids


def test_names_near_a_file_are_told_what_to_write(file, tmp_path, monkeypatch):
    path, *_ = file()
    with pytest.raises(ValueError, match=f"name its file, as '{path}'"):
        rl.load(str(path.parent))
    with pytest.raises(ValueError, match="its ~ isn't expanded"):
        rl.load("~/model.gguf")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("ROTLIB_MODELS", str(tmp_path / "models"))
    with pytest.raises(ValueError, match="let ROTLIB_MODELS name it"):
        rl.load("qwen2.5-coder-0.5b")


def test_biases_that_transformers_leaves_out_are_not_lost_in_silence(file):
    path, *_ = file("llama, biases everywhere")
    with pytest.raises(ValueError, match=r"its tensor blk\.0\.attn_.*bias has no place"):
        rl.load(str(path))
