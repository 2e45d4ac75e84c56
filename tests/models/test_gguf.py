"""The GGUF reader against the `gguf` library's own, slice by slice; damaged and foreign files are named."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.gguf import load_gguf
from jaxalign.models.gguf_file import open_gguf
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from tests.models.gguf_write import KIND, random_blocks, write_gguf
from tests.models.hf_folder import mesh, state_dict, tiny

PACKED = ["BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def write(path, kind="F32", extra=None, tables=None, **keys):
    config, model, base = tiny(**(SIZES | keys))
    write_gguf(path, state_dict(model, base), config, KIND[kind], extra, tables)
    return config, base


def library(path) -> dict[str, np.ndarray]:
    """Every tensor as the library reads and unpacks it."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["F32", *PACKED])
def test_every_slice_is_the_librarys(tmp_path, kind):
    path = tmp_path / "m.gguf"
    write(path, kind)
    file = open_gguf(path)
    want = library(path)
    assert set(file.tensors) == set(want)
    for name, values in want.items():
        values = np.atleast_2d(values)
        assert file.tensors[name].shape == want[name].shape
        columns = values.shape[1]
        for rows in (slice(0, len(values)), slice(3, 7), np.array([5, 1, 1])):
            if isinstance(rows, np.ndarray) and len(values) < 6:
                continue
            for part in (slice(0, columns), slice(31, 65), slice(columns // 2, columns)):
                got = np.asarray(file.rows(name, rows, part), np.float32)
                np.testing.assert_array_equal(got, values[rows][:, part].astype(np.float32), err_msg=name)


def test_metadata_is_the_librarys(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("a.string", "grüße")
    writer.add_float32("a.float", 1e-5)
    writer.add_bool("a.bool", True)
    writer.add_int64("a.int", -(2**40))
    writer.add_array("a.words", ["x", "", "zz"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 2.0])
    writer.add_tensor("t", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_gguf(path).metadata
    reader = gguf.GGUFReader(path)
    for key in ("a.string", "a.bool", "a.int", "general.architecture"):
        assert got[key] == reader.fields[key].contents()
    assert got["a.float"] == 1e-5  # the shortest decimal of the stored number
    assert np.float32(got["a.float"]) == np.float32(reader.fields["a.float"].contents())
    for key in ("a.words", "a.numbers", "a.floats"):
        assert list(got[key]) == reader.fields[key].contents()


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_model_comes_back_as_it_was(tmp_path, sizes):
    _, base = write(tmp_path / "m.gguf", attention_bias=True)
    got = load_model(resolve(str(tmp_path / "m.gguf")), mesh(**sizes))
    jax.tree.map(np.testing.assert_array_equal, got.base, base)
    assert got.stop_tokens == (2,)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_sharding_does_not_change_a_quantised_model(tmp_path, kind):
    """With fsdp 8 a device holds 32 of 256 columns: an eighth of a K-quant's block."""
    write(tmp_path / "m.gguf", kind)
    source = resolve(str(tmp_path / "m.gguf"))
    whole = load_model(source, mesh())
    parts = load_model(source, mesh(fsdp=8))
    jax.tree.map(np.testing.assert_array_equal, whole.base, parts.base)
    half = load_model(source, mesh(fsdp=4, tensor=2), param_dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(whole.base), jax.tree.leaves(half.base), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)


def test_gemmas_norms_lose_the_one_that_was_added(tmp_path):
    keys = {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    _, base = write(tmp_path / "m.gguf", **keys)
    got = load_model(resolve(str(tmp_path / "m.gguf")), mesh())
    for a, b in zip(jax.tree.leaves(got.base), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_every_end_token_is_a_stop_token(tmp_path):
    extra = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    write(tmp_path / "m.gguf", extra=extra)
    config, _ = load_gguf(tmp_path / "m.gguf")
    assert config["eos_token_id"] == [2, 5]
    assert load_model(resolve(str(tmp_path / "m.gguf")), mesh()).stop_tokens == (2, 5)


def test_config_says_what_the_metadata_says(tmp_path):
    want, _ = write(tmp_path / "m.gguf", extra={"rope.freq_base": 500.0})
    got, _ = load_gguf(tmp_path / "m.gguf")
    same = [k for k in want if k not in ("rope_parameters",)]
    assert {k: got[k] for k in same} == {k: want[k] for k in same}
    assert got["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}


# --- bad input


@pytest.mark.parametrize("left", [0, 3, 20, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, left):
    path = tmp_path / "m.gguf"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    with pytest.raises(UserError) as error:
        load_gguf(path)
    message = str(error.value)
    assert "m.gguf" in message
    assert "truncated" in message or "empty" in message
    if left in (0.5, 0.999):
        names = [
            t for t in message.split("'") if t in ("output.weight",) or t.startswith(("blk.", "output_"))
        ]
        assert names, message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "original_context_length"),
        ({"split.count": 2}, "split into several"),
    ],
)
def test_settings_that_are_not_understood_are_refused(tmp_path, extra, words):
    write(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(UserError) as error:
        load_gguf(tmp_path / "m.gguf")
    assert words in str(error.value)


def test_a_foreign_table_of_rope_factors_is_refused(tmp_path):
    table = np.linspace(1, 3, 32)
    write(tmp_path / "m.gguf", tables={"rope_freqs.weight": table})
    with pytest.raises(UserError, match="rope_freqs"):
        load_gguf(tmp_path / "m.gguf")


def test_another_architecture_version_and_format_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba'"):
        load_gguf(path)
    raw = bytearray(path.read_bytes())
    raw[4] = 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="version 1"):
        load_gguf(path)
    path.write_bytes(b"PK\x03\x04 not a gguf at all")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load_gguf(path)


def test_a_missing_tensor_is_named(tmp_path):
    config, model, base = tiny(**SIZES)
    state = state_dict(model, base)
    state.pop("model.layers.1.mlp.gate_proj.weight")
    write_gguf(tmp_path / "m.gguf", state, config)
    with pytest.raises(UserError, match=r"missing tensor 'model\.layers\.1\.mlp\.gate_proj\.weight'"):
        load_model(resolve(str(tmp_path / "m.gguf")), mesh())


def test_a_type_that_cannot_be_unpacked_is_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("output.weight", np.zeros((4, 40), np.uint8), raw_dtype=KIND.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="type Q8_1"):
        open_gguf(tmp_path / "m.gguf").rows("output.weight", slice(0, 1), slice(0, 32))


def test_random_blocks_are_finite_and_not_constant():
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        values = gguf.dequantize(random_blocks(KIND[kind], 4, 512), KIND[kind])
        assert np.isfinite(values).all()
        assert values.std() > 1e-3
