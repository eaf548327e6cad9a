"""``load_into``: every dialect into a model, and the model only changed when all is well."""

from __future__ import annotations

from pathlib import Path

import dialects
import pytest
import torch
from dialects import Content, Layer
from helpers import assert_same
from llamas import dense, empty, generate, llama, write
from torch import Tensor, nn

from mxfp8_ops import Mxfp8Linear, environment, linear, reference
from mxfp8_ops.checkpoint import CheckpointError, load_into, open_checkpoint
from mxfp8_ops.checkpoint.formats import FORMATS

IDS = torch.arange(40, 52)[None]
COUNT = 8
SHARDS = {"comfyui": 1, "comfyui-metadata": 1}
ONE_EACH = [
    "modelopt", "modelopt-mixed", "mxfp8", "fp8-1x32", "fp8-32x32", "compressed-tensors", "auto-round",
    "quark-per-block", "modelslim", "comfyui", "torchao-swizzled",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama(num_hidden_layers=1, initializer_range=0.2, attention_bias=False, head_dim=32)


@pytest.fixture(scope="module")
def content(model: nn.Module) -> Content:
    return dialects.llama_content(model)


def logits(model: nn.Module, backend: str | None = None, **options: object) -> object:
    def compute(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    return compute if backend is None else torch.compile(compute, backend=backend, options=options)


@pytest.fixture(scope="module")
def tokens(model: nn.Module, content: Content) -> dict[str, list[int]]:
    """What the weights of each dialect say in bfloat16, dequantized by the reference."""
    said: dict[tuple[int, ...], list[int]] = {}
    found = {}
    for dialect in dialects.WRITERS:
        sayable = dialects.sayable(dialect, content)
        key = tuple(int(layer.scale.long().sum()) for layer in sayable.layers.values())
        if key not in said:
            said[key] = generate(logits(dense(model, sayable)), IDS, COUNT)
        found[dialect] = said[key]
    return found


@pytest.mark.parametrize("dialect", dialects.WRITERS)
def test_a_llama_in_every_dialect_is_loaded_bit_for_bit_and_computes_what_its_dequantized_weights_do(
    dialect: str, model: nn.Module, content: Content, tokens: dict[str, list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    content = dialects.sayable(dialect, content)
    loaded = empty(model)
    summary = load_into(
        loaded, open_checkpoint(write(tmp_path / dialect, dialect, content, shards=SHARDS.get(dialect, 2)))
    )
    assert {each.name for each in summary} == content.layers.keys()
    for name, layer in content.layers.items():
        module = loaded.get_submodule(name)
        assert type(module) is Mxfp8Linear
        assert_same(module.weight, layer.weight)
        assert_same(module.weight_scale, layer.scale)
    assert generate(logits(loaded), IDS, COUNT) == tokens[dialect]
    monkeypatch.setenv(environment.KERNELS, "off")
    assert_same(logits(loaded)(IDS), logits(dense(model, content))(IDS))


@pytest.mark.parametrize("dialect", ONE_EACH)
def test_a_llama_in_every_format_generates_the_tokens_of_its_dequantized_weights_compiled_folded_and_kept(
    dialect: str, model: nn.Module, content: Content, tokens: dict[str, list[int]], tmp_path: Path
) -> None:
    loaded = empty(model)
    load_into(loaded, open_checkpoint(write(tmp_path / dialect, dialect, dialects.sayable(dialect, content))))
    with torch.no_grad():
        for fold in (True, False):
            assert generate(logits(loaded, "mxfp8", dequant_at_load=fold), IDS, COUNT) == tokens[dialect]


def test_one_dialect_of_every_format_is_among_those_that_are_compiled(content: Content, tmp_path: Path) -> None:
    names = [
        open_checkpoint(write(tmp_path / each, each, dialects.sayable(each, content))).format.name for each in ONE_EACH
    ]
    assert {*names, "unquantized"} == {each.name for each in FORMATS}


def test_the_tokens_depend_on_the_weights(tokens: dict[str, list[int]]) -> None:
    assert len({tuple(each) for each in tokens.values()}) > 1
    assert all(len(set(each)) > 2 for each in tokens.values())


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_makes_plain_linears_of_the_dequantized_values_an_argument_beats_it(
    flag: bool, model: nn.Module, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content))
    monkeypatch.setenv(environment.DEQUANT_AT_LOAD[0], "on" if flag else "off")
    by_flag, against_it = empty(model), empty(model)
    summary = load_into(by_flag, checkpoint)
    load_into(against_it, checkpoint, dequant_at_load=not flag)
    folded, kept = (by_flag, against_it) if flag else (against_it, by_flag)
    expected = dense(model, content)
    for name in content.layers:
        assert type(folded.get_submodule(name)) is nn.Linear
        assert_same(folded.get_submodule(name).weight, expected.get_submodule(name).weight)
        assert type(kept.get_submodule(name)) is Mxfp8Linear
    assert {(each.action, each.reason) for each in summary} == {
        ("dequantized", "the flag is on") if flag else ("kept", "")
    }
    for each in summary:
        n, k = each.shape
        assert (each.bytes_before, each.bytes_after) == (n * k * 33 // 32, n * k * 2 if flag else n * k * 33 // 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_converts_everything_that_is_not_mxfp8(
    dtype: torch.dtype, model: nn.Module, content: Content, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", "mxfp8", content))
    kept, folded = empty(model), empty(model)
    load_into(kept, checkpoint, dtype=dtype)
    load_into(folded, checkpoint, dequant_at_load=True, dtype=dtype)
    for name, tensor in content.plain.items():
        assert_same(kept.state_dict()[name], tensor.to(dtype))
    for name, layer in content.layers.items():
        assert_same(kept.get_submodule(name).weight, layer.weight)
        assert_same(folded.get_submodule(name).weight, reference.dequant(layer.weight, layer.scale, dtype))


class Merged(nn.Module):
    """q, k and v as one, gate and up as one, and experts in one parameter, as servers have them."""

    def __init__(self, content: Content) -> None:
        super().__init__()
        shapes = {name: layer.weight.shape for name, layer in content.layers.items()}
        k = shapes["a.q_proj"][1]
        self.a = nn.Module()
        self.a.qkv_proj = nn.Linear(k, sum(shapes[f"a.{each}_proj"][0] for each in "qkv"), device="meta")
        self.m = nn.Module()
        self.m.gate_up_proj = nn.Linear(64, 2 * 96, bias=False, device="meta")
        self.m.experts = nn.Module()
        self.m.experts.gate_up_proj = nn.Parameter(torch.empty(3, 2 * 32, 64, device="meta"))
        self.m.experts.down_proj = nn.Parameter(torch.empty(3, 64, 32, device="meta"))


MERGED = {
    "a.q_proj": (64, 96), "a.k_proj": (32, 96), "a.v_proj": (48, 96), "m.gate_proj": (96, 64), "m.up_proj": (96, 64),
    **{f"m.experts.{e}.{part}": (32, 64) for e in range(3) for part in ("w1", "w3")},
    **{f"m.experts.{e}.w2": (64, 32) for e in range(3)},
}  # fmt: skip


@pytest.fixture
def parts() -> Content:
    content = dialects.random_content(3, MERGED, scale_bytes=range(100, 150))
    content.plain = {}
    for name in ("a.q_proj", "a.k_proj", "a.v_proj"):
        content.layers[name].bias = torch.randn(MERGED[name][0]).bfloat16()
    return content


def test_parts_are_joined_where_the_model_has_one_module_and_experts_where_it_has_one_parameter(
    parts: Content, tmp_path: Path
) -> None:
    model = Merged(parts)
    summary = load_into(model, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", parts, shards=3)))
    assert type(model.a.qkv_proj) is type(model.m.gate_up_proj) is Mxfp8Linear

    def joined(*names: str) -> tuple[Tensor, Tensor]:
        layers = [parts.layers[name] for name in names]
        return torch.cat([each.weight.view(torch.uint8) for each in layers]), torch.cat([each.scale for each in layers])

    for module, names in ((model.a.qkv_proj, ["a.q_proj", "a.k_proj", "a.v_proj"]),
                          (model.m.gate_up_proj, ["m.gate_proj", "m.up_proj"])):  # fmt: skip
        weight, scale = joined(*names)
        assert_same(module.weight.view(torch.uint8), weight)
        assert_same(module.weight_scale, scale)
    assert_same(model.a.qkv_proj.bias, torch.cat([parts.layers[f"a.{each}_proj"].bias for each in "qkv"]))
    for parameter, each in ((model.m.experts.gate_up_proj, ("w1", "w3")), (model.m.experts.down_proj, ("w2",))):
        for expert in range(3):
            weight, scale = joined(*(f"m.experts.{expert}.{part}" for part in each))
            values = reference.dequant(weight.view(torch.float8_e4m3fn), scale, torch.bfloat16)
            assert_same(parameter[expert], values)
    reasons = {each.name: (each.action, each.reason) for each in summary}
    assert reasons["a.qkv_proj"] == ("kept", "")
    assert reasons["m.experts.down_proj"] == (
        "dequantized", "a parameter of experts, for which there is no MXFP8 module",
    )  # fmt: skip


@pytest.mark.parametrize("gone", ["a.k_proj", "m.experts.1.w2"])
def test_a_missing_part_is_named(gone: str, parts: Content, tmp_path: Path) -> None:
    model = Merged(parts)
    del parts.layers[gone]
    with pytest.raises(CheckpointError, match=rf"is made of .* but the checkpoint has no {gone}\.weight"):
        load_into(model, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", parts)))


def test_a_fused_linear_of_mxfp8_and_other_parts_is_refused(parts: Content, tmp_path: Path) -> None:
    model = Merged(parts)
    layer = parts.layers.pop("a.k_proj")
    parts.plain = {"a.k_proj.weight": torch.zeros(layer.weight.shape).bfloat16(), "a.k_proj.bias": layer.bias}
    with pytest.raises(CheckpointError, match=r"a\.qkv_proj\.weight is made of layers of which some are MXFP8"):
        load_into(model, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", parts)))


def test_experts_in_one_tensor_are_dequantized_into_their_parameter(tmp_path: Path) -> None:
    content = dialects.random_content(4, {"e.experts.gate_up_proj": (3, 128, 96)}, scale_bytes=range(90, 160))
    content.plain = {}
    content.layers["e.experts.gate_up_proj"].bias = None
    model = nn.Module()
    model.e = nn.Module()
    model.e.experts = nn.Module()
    model.e.experts.gate_up_proj = nn.Parameter(torch.empty(3, 128, 96, device="meta"))
    layer = content.layers["e.experts.gate_up_proj"]
    for dialect in sorted(dialects.STACKED_EXPERTS - set(dialects.BLOCK_ROWS)):
        load_into(model, open_checkpoint(write(tmp_path / dialect, dialect, content)))
        assert_same(model.e.experts.gate_up_proj, reference.dequant(layer.weight, layer.scale, torch.bfloat16))


def test_a_k_that_is_no_multiple_of_32_is_loaded_dense_and_computes_what_its_blocks_say(tmp_path: Path) -> None:
    content = dialects.ragged(dialects.random_content(5, {"up": (48, 96)}, scale_bytes=range(100, 150)))
    content.plain = {}
    model = nn.Sequential()
    model.up = nn.Linear(76, 48, device="meta")
    (summary,) = load_into(model, open_checkpoint(write(tmp_path / "checkpoint", "modelslim", content)))
    assert (summary.action, summary.reason) == ("dequantized", "K = 76 is not a multiple of 32")
    layer = dialects.padded(content).layers["up"]
    assert_same(model.up.weight, reference.dequant(layer.weight, layer.scale, torch.bfloat16)[:, :76].contiguous())


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    tied = llama(num_hidden_layers=1, tie_word_embeddings=True)
    content = dialects.llama_content(tied)
    assert "lm_head.weight" not in content.plain
    loaded = empty(tied)
    load_into(loaded, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded.lm_head.weight, tied.lm_head.weight)


def test_a_model_that_has_tensors_already_gets_new_ones_and_keeps_mode_gradient_and_packing(tmp_path: Path) -> None:
    content = dialects.random_content(6, {"kept": (64, 64), "packed": (64, 64)}, scale_bytes=range(100, 150))
    content.plain = {"dense.weight": torch.randn(32, 64).bfloat16(), "dense.bias": torch.randn(32).bfloat16()}
    model = nn.Sequential()
    model.kept = nn.Linear(64, 64).eval()
    model.packed = Mxfp8Linear(64, 64, bias=False).pack_()
    model.dense = Mxfp8Linear(64, 32)
    load_into(model, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content)))
    assert not model.kept.training
    assert model.packed.extra_repr().endswith("packed=bfloat16")
    assert_same(model.packed.quantized()[0], content.layers["packed"].weight)
    assert type(model.dense) is nn.Linear
    assert_same(model.dense.weight, content.plain["dense.weight"])
    assert model.kept.bias.requires_grad
    assert not model.kept.weight.requires_grad


def test_rename_leads_names_to_the_model_and_leaves_tensors_out(
    model: nn.Module, content: Content, tmp_path: Path
) -> None:
    inner = empty(model).model
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content))
    with pytest.raises(CheckpointError, match=r"the model has no place for lm_head\.weight, model\."):
        load_into(inner, checkpoint)
    load_into(inner, checkpoint, rename=lambda name: name.removeprefix("model.") if name != "lm_head.weight" else None)
    name = "layers.0.mlp.up_proj"
    assert_same(inner.get_submodule(name).weight, content.layers[f"model.{name}"].weight)


def test_a_module_that_reads_the_weights_of_its_linears_gets_them_dequantized(tmp_path: Path) -> None:
    content = dialects.random_content(7, {"attention.out_proj": (64, 64)}, scale_bytes=range(100, 150))
    content.plain = {"attention.in_proj_weight": torch.randn(192, 64), "attention.in_proj_bias": torch.zeros(192)}
    model = nn.Sequential()
    model.attention = nn.MultiheadAttention(64, 2, device="meta")
    (summary,) = load_into(
        model, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content)), dtype=torch.float32
    )
    assert summary.reason == "attention reads its weight directly"
    layer = content.layers["attention.out_proj"]
    assert_same(model.attention.out_proj.weight, reference.dequant(layer.weight, layer.scale, torch.float32))


def test_scales_of_a_quantized_cache_are_passed_over(model: nn.Module, content: Content, tmp_path: Path) -> None:
    loaded = empty(model)
    load_into(loaded, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", dialects.with_kv_scales(content))))
    assert_same(loaded.lm_head.weight, content.plain["lm_head.weight"])


def _without(name: str) -> object:
    def change(content: Content) -> None:
        (content.plain if name in content.plain else content.layers).pop(name)

    return change


def _with(name: str, tensor: Tensor) -> object:
    def change(content: Content) -> None:
        content.plain[name] = tensor

    return change


def _zero_scales(content: Content) -> None:
    layer = content.layers["model.layers.0.mlp.down_proj"]
    content.layers["model.layers.0.mlp.down_proj"] = Layer(layer.weight, torch.zeros_like(layer.scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model.norm.weight"), r"nothing in it for the model's model\.norm\.weight"),
        (_without("model.layers.0.mlp.up_proj"), r"nothing in it for the model's model\.layers\.0\.mlp\.up_proj"),
        (_with("model.extra.weight", torch.ones(3)), r"the model has no place for model\.extra\.weight"),
        (_with("model.norm.weight", torch.ones(3)), r"model\.norm\.weight is \[128\] in the model.*F32 \[3\]"),
        (_zero_scales, r"down_proj\.weight_scale .*all scales are 0"),
    ],
)  # fmt: skip
def test_after_an_error_the_model_is_as_before(
    change: object, message: str, model: nn.Module, content: Content, tmp_path: Path
) -> None:
    changed = Content({**content.layers}, {**content.plain}, content.config, content.unquantized)
    change(changed)  # type: ignore[operator]
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", "modelopt", changed, shards=2))
    before = [(name, module, [*module.parameters(recurse=False)]) for name, module in model.named_modules()]
    with pytest.raises(CheckpointError, match=message):
        load_into(model, checkpoint)
    after = [(name, module, [*module.parameters(recurse=False)]) for name, module in model.named_modules()]
    for (_, old, old_parameters), (_, new, new_parameters) in zip(before, after, strict=True):
        assert old is new
        assert all(a is b for a, b in zip(old_parameters, new_parameters, strict=True))


def test_a_buffer_that_no_checkpoint_has_must_not_be_on_the_meta_device(
    model: nn.Module, content: Content, tmp_path: Path
) -> None:
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    with pytest.raises(ValueError, match=r"inv_freq.* are on the meta device(.|\n)*include_buffers=False"):
        load_into(nowhere, open_checkpoint(write(tmp_path / "checkpoint", "modelopt", content)))


def test_loaded_layers_compute_like_the_operator(model: nn.Module, content: Content, tmp_path: Path) -> None:
    loaded = empty(model)
    load_into(loaded, open_checkpoint(write(tmp_path / "checkpoint", "fp8-1x32-e8m0", content, shards=3)))
    x = torch.randn(3, 128).bfloat16()
    layer = content.layers["model.layers.0.mlp.up_proj"]
    assert_same(loaded.get_submodule("model.layers.0.mlp.up_proj")(x), linear(x, layer.weight, layer.scale))
